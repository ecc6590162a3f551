"""Finding the pairs of image and label of a dataset, in the layouts that datasets come in.

These are the Medical Segmentation Decathlon's dataset.json, the raw folders of nnU-Net 1 and 2,
BIDS derivatives, a folder of images next to a folder of labels, a folder of both, and a table.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from pipeline.errors import ConfigError
from pipeline.io.bids_layout import bids_layout
from pipeline.io.case_table import TABLE_SUFFIXES, table_layout
from pipeline.io.dataset_json import (
    IMAGES,
    LABELS,
    listed_layout,
    nnunet_layout,
    read_dataset_json,
)
from pipeline.io.formats import image_stem
from pipeline.io.layout import (
    CHANNEL_NAME,
    LABEL_ENDING,
    Layout,
    Problem,
    numbered_channels,
    pair_by_name,
    volumes_in,
)

FOLDER_PAIRS = (("images", "labels"), ("image", "label"), ("images", "masks"))


def find_pairs(folders: Sequence[Path]) -> Layout:
    """Find the pairs of image and label of a dataset.

    Of a single folder, the first of these layouts that fits is taken:

    1. Decathlon or nnU-Net 1: a dataset.json with a list `training`.
    2. nnU-Net 2: folders imagesTr and labelsTr, or a dataset.json with a mapping `dataset`.
    3. BIDS: a folder derivatives.
    4. Folders images and labels (or masks), or image and label.
    5. Label maps next to their images: c0.nrrd and c0.seg.nrrd, or c0.nii.gz and c0-label.nii.gz.

    Args:
        folders: one folder in one of these layouts, a CSV or TSV file (see `table_layout`), or a
            folder of images and a folder of labels.

    Returns:
        The layout with all pairs, and with a problem for each file that is not part of one.

    Raises:
        ConfigError: a folder does not exist, its layout is unknown, its dataset.json or the table
            cannot be read, or the number of folders is not 1 or 2.
    """
    if len(folders) not in (1, 2):
        named = ", ".join(str(folder) for folder in folders) or "no folder"
        raise ConfigError(
            f"{named}: expected one dataset folder, or a folder of images and a folder of labels"
        )
    root = folders[0]
    if len(folders) == 1 and is_table(root):
        return table_layout(root)
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(f"{folder}: no such folder")
    return _two_folders(*folders) if len(folders) == 2 else _one_folder(root)


def is_table(path: Path) -> bool:
    """Return whether a path is a table of cases rather than a folder."""
    return path.suffix.lower() in TABLE_SUFFIXES and path.is_file()


def _one_folder(root: Path) -> Layout:
    """Return the layout of a single folder.

    Raises:
        ConfigError: it has none of the known layouts.
    """
    content = read_dataset_json(root)
    if isinstance(content.get("training"), list):
        return listed_layout(root, content)
    if isinstance(content.get("dataset"), dict) or _is_pair(root, IMAGES, LABELS):
        return nnunet_layout(root, content)
    if (root / "derivatives").is_dir():
        return bids_layout(root)
    for images, labels in FOLDER_PAIRS:
        if _is_pair(root, images, labels):
            return _two_folders(root / images, root / labels)
    beside = _labels_beside_images(root)
    if beside.cases:
        return beside
    raise ConfigError(
        f"{root}: expected a Decathlon dataset.json, an nnU-Net folder (imagesTr, labelsTr), "
        "BIDS with derivatives, folders images and labels, or label maps next to their images "
        "(c0.nrrd and c0.seg.nrrd); "
        "or name a folder of images and a folder of labels, or a CSV with the columns case, one "
        "per channel, and label"
    )


def _is_pair(root: Path, images: str, labels: str) -> bool:
    return (root / images).is_dir() and (root / labels).is_dir()


def _two_folders(images: Path, labels: Path) -> Layout:
    """Pair the images of a folder with the label maps of another one.

    The name of a label map is that of its image, and may also have a `LABEL_ENDING`; the name of an
    image may also have the number of its channel, as nnU-Net's have.
    """
    if (images.name, labels.name) == (IMAGES, LABELS) and images.parent == labels.parent:
        root = images.parent
        # what dataset.json says of the labels counts, above all which of them is to be ignored
        if "labels" in read_dataset_json(root):
            return _one_folder(root)
    found = volumes_in(images)
    by_name = {image_stem(path): [path] for path in found}
    label_of, problems = _named_labels(volumes_in(labels), by_name)
    if not by_name.keys() & label_of.keys() and any(CHANNEL_NAME.match(name) for name in by_name):
        by_name, more = numbered_channels(found)
        problems += more
    cases, unpaired = pair_by_name(by_name, label_of)
    return Layout(
        kind="a folder of images and one of labels", cases=cases, problems=problems + unpaired
    )


def _named_labels(
    paths: Sequence[Path], images: Collection[str] = ()
) -> tuple[dict[str, Path], list[Problem]]:
    """Return case → its label map, and a problem for each second label map of a case.

    Args:
        paths: label maps.
        images: names of cases that a label map may have with a `LABEL_ENDING` in them.
    """
    label_of: dict[str, Path] = {}
    problems = []
    for path in paths:
        stem = image_stem(path)
        name = stem if stem in images else LABEL_ENDING.sub("", stem)
        if name in label_of:
            message = f"{path}: a second label map of this case, after {label_of[name]}"
            problems.append(Problem(case=name, message=message, kind="duplicate"))
        else:
            label_of[name] = path
    return label_of, problems


def _labels_beside_images(root: Path) -> Layout:
    """Pair label maps, whose names have a `LABEL_ENDING`, with images of the same folder."""
    volumes = volumes_in(root)
    labels = [path for path in volumes if LABEL_ENDING.search(image_stem(path))]
    label_of, problems = _named_labels(labels)
    images = {image_stem(path): [path] for path in volumes if path not in labels}
    cases, unpaired = pair_by_name(images, label_of)
    return Layout(
        kind="a folder of images and their labels", cases=cases, problems=problems + unpaired
    )
