"""MONAI bundles: found, opened, checked, refreshed, exported and imported.

opening        a bundle by path or name, opened for inference
trust          which bundles can run code, and the error that keeps them from it
info           what a bundle is, without evaluating it
wiring         the wiring that volseg writes, and which release wrote a bundle's
metadata       metadata.json, from spec and card
check          MONAI's checks, those of its model zoo, and ours, all offline
zoo_files      rules of the model zoo for the files of a bundle
zoo_metadata   … for metadata.json
zoo_configs    … for its configurations
findings       what a check found
export         the network for other runtimes
inline_spec    the wiring for files that leave the bundle's folder
weight_import  published checkpoints as bundles
nnunet_import  trained models of nnU-Net as bundles
nnunet_plans   what their plans say, as a spec
imported       what all imports write
templates/     the wiring itself, and the schema of the metadata
"""

from pipeline.bundle.check import check_bundle
from pipeline.bundle.export import ExportReport, export_bundle
from pipeline.bundle.findings import CheckReport, Finding
from pipeline.bundle.foreign.files import ForeignFacts, foreign_facts
from pipeline.bundle.info import BundleInfo, bundle_info
from pipeline.bundle.inline_spec import parse_spec
from pipeline.bundle.nnunet_import import NnUNetModel, import_nnunet, is_nnunet_folder
from pipeline.bundle.opening import (
    find_bundle,
    open_bundle,
    open_for_cases,
    shipped_bundles,
)
from pipeline.bundle.overrides import parse_overrides
from pipeline.bundle.trust import check_plain, code_hash
from pipeline.bundle.weight_import import PublishedNetwork, import_checkpoint
from pipeline.bundle.wiring import (
    NO_LICENCE,
    WIRING,
    Refreshed,
    read_wiring,
    refresh_bundle,
    template,
    wiring_origin,
)
from pipeline.bundle.zoo_files import BUNDLE_NAME, BUNDLE_NAME_RULE
from pipeline.bundle.zoo_metadata import PLACEHOLDER

__all__ = [
    "BUNDLE_NAME",
    "BUNDLE_NAME_RULE",
    "NO_LICENCE",
    "PLACEHOLDER",
    "WIRING",
    "BundleInfo",
    "CheckReport",
    "ExportReport",
    "Finding",
    "ForeignFacts",
    "NnUNetModel",
    "PublishedNetwork",
    "Refreshed",
    "bundle_info",
    "check_bundle",
    "check_plain",
    "code_hash",
    "export_bundle",
    "find_bundle",
    "foreign_facts",
    "import_checkpoint",
    "import_nnunet",
    "is_nnunet_folder",
    "open_bundle",
    "open_for_cases",
    "parse_overrides",
    "parse_spec",
    "read_wiring",
    "refresh_bundle",
    "shipped_bundles",
    "template",
    "wiring_origin",
]
