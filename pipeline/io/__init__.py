"""Reading and writing: images, label maps, tables, and the datasets that they come in.

Images are read and written here only; all other packages take arrays and affines.

- `formats`: suffixes of image files.
- `image`: one channel in memory, and the checks that all readers share.
- `reader`: files and images in memory → `Image`.
- `dicom_series`: DICOM files, without reading them.
- `dicom_discovery`: DICOM series among files of any names.
- `dicom_kinds`: which of them are no volumes, such as localisers.
- `dicom_frames`, `dicom_geometry`, `dicom`: DICOM series → `Image`.
- `dicom_codes`: codes of structures, known ones and those of a table.
- `dicom_seg`, `dicom_report`: label maps → DICOM segmentations and reports of volumes.
- `itk`: SimpleITK images → `Image`, and label maps → SimpleITK images.
- `header`: shape and affine of a volume without its voxels.
- `grid`: the grid that a label map is written on.
- `case_warnings`: the warnings about a case, in the `meta` of its tensor.
- `label_map`: label maps of datasets, checked.
- `writer`: label maps as NIfTI files; atomic writing.
- `cases`: the cases to segment in files, folders, globs and manifests.
- `discovery`: image files in folders and globs.
- `manifest_file`: lists of cases in CSV, TSV and JSON lines.
- `layout`: the labelled cases of a dataset, as all layouts give them.
- `layouts`: finding them, whatever the layout.
- `dataset_json`: Decathlon, nnU-Net 1 and 2.
- `bids_names`: entities in names of files.
- `bids_dataset`: the images of a raw BIDS dataset to segment.
- `bids_layout`: labelled cases in BIDS derivatives.
- `case_table`: CSV and TSV files.
- `dataset`: labelled cases and their folds.
- `label_table`: names, values and colours of labels.
- `label_files`: the same as files that viewers read, and as an extension of NIfTI files.
- `aseg_stats`: volumes in the format of FreeSurfer's statistics.
- `tables`: CSV and JSON files.
"""

from pipeline.io.aseg_stats import AsegMeasure, AsegRow, aseg_stats_text
from pipeline.io.bids_dataset import (
    PARTICIPANTS_TSV,
    SEGMENTATION_ENDING,
    SESSIONS_TSV,
    BidsQuery,
    bids_subjects,
    find_bids_cases,
    read_bids_filter,
    read_participants,
    read_sessions,
)
from pipeline.io.bids_names import ENTITY_NAMES, BidsName, derivative_stem, parse_bids_name
from pipeline.io.case_warnings import add_warnings, warnings_of
from pipeline.io.cases import case_name, find_cases
from pipeline.io.copies import write_copy, write_part
from pipeline.io.dataset import (
    expand_variables,
    fold_cases,
    label_maps,
    read_splits,
    training_cases,
    validation_cases,
)
from pipeline.io.dicom_codes import StructureCode, codes_hash, read_structure_codes
from pipeline.io.dicom_seg import Algorithm, DicomObjects, dicom_objects
from pipeline.io.dicom_series import DicomSeries
from pipeline.io.discovery import (
    DICOM_ENDINGS,
    LABEL_MAP_ENDINGS,
    LABELS_ENDING,
    PROBABILITIES_ENDING,
    RESULT_ENDINGS,
    UNCERTAINTY_ENDING,
    WRITTEN_ENDINGS,
    is_readable,
    is_written_by_volseg,
)
from pipeline.io.formats import printable
from pipeline.io.grid import Grid
from pipeline.io.header import read_header, series_of, source_files, source_path
from pipeline.io.image import SAME_GRID_MM, Header, Image, check_same_grid, corner_distance
from pipeline.io.itk import as_sitk
from pipeline.io.label_files import (
    LABEL_FILES,
    caret_xml,
    dseg_text,
    structure_name,
    write_label_files,
)
from pipeline.io.label_map import LabelImage, check_label_grid, read_label_map
from pipeline.io.label_table import LabelColor, label_table, labels_of_values
from pipeline.io.layout import Layout, Modality, Problem
from pipeline.io.layouts import find_pairs
from pipeline.io.locks import locked, locked_once
from pipeline.io.reader import channel_headers, read, read_channels, source_list
from pipeline.io.tables import read_csv, read_json, sha256, write_csv, write_json
from pipeline.io.writer import (
    TEMPORARY_SUFFIX,
    as_nibabel,
    fractions_as_nibabel,
    host_code,
    probabilities_as_nibabel,
    retry_io,
    temporary_folder,
    temporary_name,
    write_atomically,
    write_labels,
)

__all__ = [
    "DICOM_ENDINGS",
    "ENTITY_NAMES",
    "LABELS_ENDING",
    "LABEL_FILES",
    "LABEL_MAP_ENDINGS",
    "PARTICIPANTS_TSV",
    "PROBABILITIES_ENDING",
    "RESULT_ENDINGS",
    "SAME_GRID_MM",
    "SEGMENTATION_ENDING",
    "SESSIONS_TSV",
    "TEMPORARY_SUFFIX",
    "UNCERTAINTY_ENDING",
    "WRITTEN_ENDINGS",
    "Algorithm",
    "AsegMeasure",
    "AsegRow",
    "BidsName",
    "BidsQuery",
    "DicomObjects",
    "DicomSeries",
    "Grid",
    "Header",
    "Image",
    "LabelColor",
    "LabelImage",
    "Layout",
    "Modality",
    "Problem",
    "StructureCode",
    "add_warnings",
    "as_nibabel",
    "as_sitk",
    "aseg_stats_text",
    "bids_subjects",
    "caret_xml",
    "case_name",
    "channel_headers",
    "check_label_grid",
    "check_same_grid",
    "codes_hash",
    "corner_distance",
    "derivative_stem",
    "dicom_objects",
    "dseg_text",
    "expand_variables",
    "find_bids_cases",
    "find_cases",
    "find_pairs",
    "fold_cases",
    "fractions_as_nibabel",
    "host_code",
    "is_readable",
    "is_written_by_volseg",
    "label_maps",
    "label_table",
    "labels_of_values",
    "locked",
    "locked_once",
    "parse_bids_name",
    "printable",
    "probabilities_as_nibabel",
    "read",
    "read_bids_filter",
    "read_channels",
    "read_csv",
    "read_header",
    "read_json",
    "read_label_map",
    "read_participants",
    "read_sessions",
    "read_splits",
    "read_structure_codes",
    "retry_io",
    "series_of",
    "sha256",
    "source_files",
    "source_list",
    "source_path",
    "structure_name",
    "temporary_folder",
    "temporary_name",
    "training_cases",
    "validation_cases",
    "warnings_of",
    "write_atomically",
    "write_copy",
    "write_csv",
    "write_json",
    "write_label_files",
    "write_labels",
    "write_part",
]
