"""Whether a config fits a TPU slice: its programs compiled without a TPU."""
