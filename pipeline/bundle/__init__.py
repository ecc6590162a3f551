"""FIXME."""

from pipeline.bundle.check import check_bundle
from pipeline.bundle.export import export_bundle
from pipeline.bundle.metadata import WIRING, refresh_bundle
from pipeline.bundle.opening import find_bundle, open_bundle
from pipeline.bundle.weight_import import NAMES, import_checkpoint

__all__ = [
    "NAMES",
    "WIRING",
    "check_bundle",
    "export_bundle",
    "find_bundle",
    "import_checkpoint",
    "open_bundle",
    "refresh_bundle",
]
