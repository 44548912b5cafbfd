"""Finding out what went wrong in a step of training."""
