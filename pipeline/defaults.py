"""Defaults of the command line and the Python API; imports nothing, so that `--help` is fast."""

DEFAULT_BUNDLE = "brain_mr_structures"
