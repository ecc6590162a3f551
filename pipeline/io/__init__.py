"""FIXME."""

from pipeline.io.cases import case_name, find_cases, is_written_by_volseg
from pipeline.io.dataset import (
    expand_variables,
    fold_cases,
    label_maps,
    read_splits,
    training_cases,
    validation_cases,
)
from pipeline.io.grid import isotropic_grid
from pipeline.io.header import Header, read_header
from pipeline.io.layouts import Layout, find_pairs
from pipeline.io.reader import SAME_GRID_MM, Image, ReadVolumed, corner_distance, read
from pipeline.io.tables import read_csv, sha256, write_csv, write_json
from pipeline.io.writer import (
    as_nibabel,
    as_sitk,
    fractions_as_nibabel,
    write_atomically,
    write_labels,
)

__all__ = [
    "SAME_GRID_MM",
    "Header",
    "Image",
    "Layout",
    "ReadVolumed",
    "as_nibabel",
    "as_sitk",
    "case_name",
    "corner_distance",
    "expand_variables",
    "find_cases",
    "find_pairs",
    "fold_cases",
    "fractions_as_nibabel",
    "is_written_by_volseg",
    "isotropic_grid",
    "label_maps",
    "read",
    "read_csv",
    "read_header",
    "read_splits",
    "sha256",
    "training_cases",
    "validation_cases",
    "write_atomically",
    "write_csv",
    "write_json",
    "write_labels",
]
