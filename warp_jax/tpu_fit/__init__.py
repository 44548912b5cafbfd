"""Memory, network traffic and time bounds of a config on a TPU slice, from programs compiled without a TPU."""
