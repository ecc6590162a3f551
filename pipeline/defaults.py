"""Defaults of the command line and the Python API; imports nothing, so that `--help` is fast."""

DEFAULT_BUNDLE = "brain_mr_structures"

# kinds of statistics that `volseg tables --stats` writes
STATISTICS = ("ml", "icv", "asymmetry", "long", "aseg")
INTRACRANIAL = "intracranial"  # sum of the brain model that holds all that is inside the skull
