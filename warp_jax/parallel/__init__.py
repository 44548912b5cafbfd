"""Device meshes and multi-host jobs."""
