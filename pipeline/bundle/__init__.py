"""MONAI bundles: found, opened, checked, refreshed, exported and imported.

opening        a bundle by path or name, opened for inference
wiring         the wiring that volseg writes, and which release wrote a bundle's
metadata       metadata.json, from spec and card
check          MONAI's checks, offline, and ours
export         the network for other runtimes
weight_import  published checkpoints as bundles
templates/     the wiring itself, and the schema of the metadata
"""

from pipeline.bundle.check import check_bundle
from pipeline.bundle.export import ExportReport, export_bundle
from pipeline.bundle.opening import find_bundle, open_bundle, shipped_bundles
from pipeline.bundle.weight_import import PublishedNetwork, import_checkpoint
from pipeline.bundle.wiring import WIRING, Refreshed, read_wiring, refresh_bundle, template

__all__ = [
    "WIRING",
    "ExportReport",
    "PublishedNetwork",
    "Refreshed",
    "check_bundle",
    "export_bundle",
    "find_bundle",
    "import_checkpoint",
    "open_bundle",
    "read_wiring",
    "refresh_bundle",
    "shipped_bundles",
    "template",
]
