"""Constants of the command line and all packages; imports nothing, so that `--help` is fast."""

DEFAULT_BUNDLE = "brain_mr_structures"

SAFE_PATH = "PYTHONSAFEPATH"  # variable of Python's that keeps the working folder off sys.path
