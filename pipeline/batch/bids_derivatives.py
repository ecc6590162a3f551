"""BIDS derivatives in an output folder: what is derived from the records for readers of BIDS.

Label maps are written by the batch itself under names of BIDS. What lies beside them follows from
the record of each case, so that it may be derived again at any time, by several runs at once.
`.bidsignore` lists the batch's own tables and the files that BIDS has no names for.

References:
    BIDS Derivatives: https://bids-specification.readthedocs.io, "BIDS Derivatives" and
    "Imaging derivatives: segmentations".
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import metadata, version
from pathlib import Path
from typing import Any

from pipeline.batch.identity import read_labels
from pipeline.batch.outputs import LOG, RUN, OutputFolder
from pipeline.batch.records import CaseRecord
from pipeline.errors import ConfigError
from pipeline.io import (
    LABEL_FILES,
    SEGMENTATION_ENDING,
    derivative_stem,
    dseg_text,
    label_table,
    parse_bids_name,
    read_json,
    write_atomically,
)

BIDS_VERSION = "1.10.0"
TOOL = "volseg"
DATASET, IGNORED, README = "dataset_description.json", ".bidsignore", "README.md"
SIDECAR, STATS_TSV, STATS_JSON = "_dseg.json", "_stats.tsv", "_stats.json"
GROUP_TSV, GROUP_JSON = "group_volumes.tsv", "group_volumes.json"
MISSING = "n/a"  # BIDS's word for a missing value
# files that BIDS has no names for
IGNORE = (
    *(RUN, LOG, "/*.csv", "/volumes_*.tsv", GROUP_TSV, GROUP_JSON, *LABEL_FILES),
    *(f"*{STATS_TSV}", f"*{STATS_JSON}", "/report", "/freesurfer"),
)
RAW = "raw"  # name of the source dataset in BIDS URIs
# set by whoever builds a container image; the second and the third by Apptainer and Singularity
CONTAINER_VARIABLES = ("VOLSEG_CONTAINER", "APPTAINER_CONTAINER", "SINGULARITY_CONTAINER")
# Metadata that all label maps share. The file of the label table has it too, which label maps
# inherit from, so their own must be equal.
SHARED = {
    "Description": "Segmentation by volseg: each voxel has the value of a structure.",
    "SpatialReference": "orig",  # the grid of the image that is the source
    "Manual": False,
}
README_TEXT = """# Segmentations by volseg

`sub-*/[ses-*/]anat/*_desc-volseg_dseg.nii.gz` are label maps on the grids of the images that
`Sources` in their JSON files name; `desc-volseg_dseg.tsv` lists the labels. `*_stats.tsv` holds
the volume of each structure. `group_volumes.tsv` has one row per image, with `participants.tsv`.

For research only.
"""
STATS_COLUMNS = {
    "index": {"Description": "Value in the label map; n/a for a sum of several structures."},
    "name": {"Description": "Name of the structure, or of a sum that the model defines."},
    "volume": {"Description": "Volume of the structure.", "Units": "mm^3"},
}
LABEL_COLUMNS = {
    "index": {"Description": "Value in the label map.", "Format": "integer"},
    "name": {"Description": "Name of the structure."},
    "abbreviation": {"Description": "Short name of the structure."},
    "color": {"Description": "Colour to show the structure in, as #RRGGBB."},
    "mapping": {
        "Description": "Value of the tissue among BIDS's common image-derived labels.",
        "Format": "integer",
    },
}


@dataclass
class BidsDerivatives:
    """The derivatives of a dataset: `add` writes what belongs to one case.

    Attributes:
        dataset: the raw BIDS dataset.
        folder: the output folder.
    """

    dataset: Path
    folder: Path
    _labels: dict[str, int] = field(default_factory=dict)
    _tables: set[str] = field(default_factory=set)

    def add(self, record: CaseRecord) -> None:
        """Write the files of one case, and those of the dataset before the first one.

        Raises:
            WriteError: a file cannot be written.
        """
        out = OutputFolder(self.folder)
        if not self._labels:
            self._labels = read_labels(out)
            _write_dataset_files(self.dataset, out)
        name = parse_bids_name(record.case)
        if name is None:  # a file that failed by its name
            return
        stem = derivative_stem(name)
        label_map = Path(record.case).with_name(f"{stem}{SEGMENTATION_ENDING}")
        if record.is_failure:
            _remove_files_of(out.root / label_map)
            return
        self._write_label_table(out, stem)
        _write_case(out, record, label_map.as_posix(), self._labels)

    def _write_label_table(self, out: OutputFolder, stem: str) -> None:
        """Write the table of labels for all label maps with the entity `desc` of this one."""
        table = f"desc-{stem.rpartition('_desc-')[2]}_dseg"
        if table not in self._tables:
            self._tables.add(table)
            write_if_different(out, f"{table}.tsv", dseg_text(label_table(self._labels)))
            write_if_different(out, f"{table}.json", json_text({**SHARED, **LABEL_COLUMNS}))


def check_derivatives_folder(dataset: Path, folder: Path) -> None:
    """Check that the derivatives of a dataset may be written to a folder.

    Raises:
        ConfigError: it would make the dataset invalid, or it holds the derivatives of another
            program.
    """
    root, out = dataset.resolve(), folder.resolve()
    if out.is_relative_to(root) and out.relative_to(root).parts[:1] != ("derivatives",):
        raise ConfigError(
            f"{folder}: lies in the dataset itself, which would not be valid any more; expected a "
            f"folder outside, or {dataset / 'derivatives' / TOOL}"
        )
    if not (folder / DATASET).exists():
        return
    makers = [str(item.get("Name")) for item in _generated_by(read_json(folder / DATASET))]
    if TOOL not in makers:
        raise ConfigError(
            f"{folder}: holds a dataset of {', '.join(makers) or 'an unknown program'}; choose "
            "another folder"
        )


def remove_orphans(folder: Path) -> None:
    """Remove what describes label maps that are gone, as those of another model are."""
    for pattern in (f"*{TOOL}*{SIDECAR}", f"*{TOOL}*{STATS_TSV}"):
        for path in list(folder.glob(f"sub-*/**/{pattern}")):
            stem = path.name.rpartition("_")[0]
            label_map = path.with_name(f"{stem}{SEGMENTATION_ENDING}")
            if not label_map.exists():
                _remove_files_of(label_map)


def _write_dataset_files(dataset: Path, out: OutputFolder) -> None:
    """Write what describes the whole dataset of derivatives.

    Keys that somebody added to its dataset_description.json stay, and a README that is there.

    Raises:
        WriteError: a file cannot be written.
    """
    write_if_different(out, DATASET, json_text(_description(dataset, out.root)))
    write_if_different(out, IGNORED, "".join(f"{name}\n" for name in IGNORE))
    if not list(out.root.glob("README*")):
        write_if_different(out, README, README_TEXT)


def table_text(columns: Sequence[str], rows: Iterator[Sequence[Any]] | Sequence[Any]) -> str:
    """Return a TSV file as BIDS wants it: `n/a` for what is missing, no tab within a cell."""
    lines = [columns, *rows]
    return "".join("\t".join(map(_cell, line)) + "\n" for line in lines)


def json_text(content: Mapping[str, Any]) -> str:
    """Return the text of a JSON file."""
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def write_if_different(out: OutputFolder, name: str, text: str) -> None:
    """Write a file atomically, unless it has that content already.

    Args:
        out: the output folder.
        name: relative path of the file.
        text: its content.

    Raises:
        WriteError: it cannot be written.
    """
    path, content = out.root / name, text.encode(errors="backslashreplace")
    try:
        same = path.read_bytes() == content
    except OSError:
        same = False
    if not same:
        write_atomically(path, content, staging=out.staging)


def _cell(value: object) -> str:
    text = " ".join(str(value).split()) if value is not None else ""
    return text or MISSING


def _remove_files_of(label_map: Path) -> None:
    """Remove what describes a label map that is gone."""
    stem = label_map.name.removesuffix(SEGMENTATION_ENDING)
    for ending in (SIDECAR, STATS_TSV, STATS_JSON):
        label_map.with_name(f"{stem}{ending}").unlink(missing_ok=True)


def _write_case(
    out: OutputFolder, record: CaseRecord, label_map: str, labels: Mapping[str, int]
) -> None:
    """Write the metadata and the volumes of a label map."""
    stem = label_map.removesuffix(SEGMENTATION_ENDING)
    write_if_different(out, f"{stem}{SIDECAR}", json_text(_image_facts(record)))
    rows = [
        (labels.get(name), name, f"{volume:.3f}") for name, volume in record.volumes_mm3.items()
    ]
    write_if_different(out, f"{stem}{STATS_TSV}", table_text(tuple(STATS_COLUMNS), rows))
    sources = [f"bids::{label_map}", *_sources(record)]
    described = {"Description": "Volumes of the structures.", "Sources": sources}
    write_if_different(out, f"{stem}{STATS_JSON}", json_text({**described, **STATS_COLUMNS}))


def _image_facts(record: CaseRecord) -> dict[str, Any]:
    """Return the metadata of a label map."""
    return {
        **SHARED,
        "Sources": _sources(record),
        "SourceHashes": [f"sha256:{state.sha256}" for state in record.inputs],
        "Model": dict(record.made_by),
        "Versions": dict(record.versions),
        "Warnings": list(record.warnings),
    }


def _sources(record: CaseRecord) -> list[str]:
    """Return the URIs of the images of a case, which lie in the folder that its name gives."""
    folder = Path(record.case).parent.as_posix()
    return [f"bids:{RAW}:{folder}/{Path(path).name}" for path in record.image]


def _description(dataset: Path, folder: Path) -> dict[str, Any]:
    """Return the dataset_description.json of the derivatives."""
    source = _read_description(dataset)
    link = _link(dataset, folder)
    facts = {"URL": link, "DOI": source.get("DatasetDOI"), "Version": source.get("Version")}
    kept = {
        key: source[key] for key in ("Authors", "License") if source.get(key)
    }  # what was made from the images has their authors and their licence
    return {
        "Name": f"Segmentations of {source.get('Name') or dataset.resolve().name}",
        **kept,
        **_read_description(folder),
        "BIDSVersion": BIDS_VERSION,
        "DatasetType": "derivative",
        "GeneratedBy": [_generator()],
        "SourceDatasets": [{key: text for key, text in facts.items() if text}],
        "DatasetLinks": {RAW: link},
    }


def _generator() -> dict[str, Any]:
    """Return what made the derivatives: program, version, address of the code, container."""
    facts: dict[str, Any] = {
        "Name": TOOL,
        "Version": version(TOOL),
        "Description": "Segmentation of MRI volumes by U-Nets.",
    }
    address = metadata(TOOL).json.get("home_page")
    if address:
        facts["CodeURL"] = address
    container = _container(os.environ)
    if container:
        facts["Container"] = container
    return facts


def _container(environment: Mapping[str, str]) -> dict[str, str]:
    """Return type, tag and address of the container that this process runs in; empty for none.

    `VOLSEG_CONTAINER` is type and tag, such as `docker:volseg:0.2.0`; Apptainer and Singularity set
    a variable of their own to the file of the image.
    """
    ours, *theirs = CONTAINER_VARIABLES
    found: dict[str, str] = {}
    kind, _, tag = environment.get(ours, "").partition(":")
    if kind:
        found = {"Type": kind, "Tag": tag}
    for name in theirs:
        image = environment.get(name)
        if image:
            path = Path(image)
            address = path.as_uri() if path.is_absolute() else ""
            found |= {"Type": name.split("_")[0].lower(), "URI": address}
            break
    return {key: text for key, text in found.items() if text}


def _link(dataset: Path, folder: Path) -> str:
    """Return the address of the raw dataset: relative within it, so that both may be moved."""
    root, out = dataset.resolve(), folder.resolve()
    if out.is_relative_to(root):
        return "/".join([".."] * len(out.relative_to(root).parts))
    return root.as_uri()


def _read_description(folder: Path) -> dict[str, Any]:
    try:
        content = read_json(folder / DATASET)
    except ConfigError:
        return {}
    return content if isinstance(content, dict) else {}


def _generated_by(description: object) -> list[Mapping[str, Any]]:
    items = description.get("GeneratedBy", []) if isinstance(description, dict) else []
    found = items if isinstance(items, list) else []
    return [item for item in found if isinstance(item, dict)]
