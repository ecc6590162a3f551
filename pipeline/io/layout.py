"""The labelled cases of a dataset, and the helpers that all layouts share."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pipeline.io.formats import image_stem, image_suffix
from pipeline.types import Case

ProblemKind = Literal[
    "missing_file",  # dataset.json or a table lists a file that does not exist
    "not_listed",  # a file that dataset.json does not list
    "channel_name",  # a name without the number of a channel
    "channels",  # not the channels that most cases have
    "no_image",
    "no_label",
    "duplicate",  # a second label map, or the image of another case
    "unusable",  # a file that cannot be read, or that cannot be trained on
]
Modality = Literal["CT", "MR"]

CHANNEL_NAME = re.compile(r"(.+)_(\d{4})$")
# what 3D Slicer, ITK-SNAP, BIDS and others append to a scan's name: c0.seg, c0-label, c0_dseg
LABEL_ENDING = re.compile(r"[._-](?:d?seg|labels?|labelmap|mask|segmentation)$", re.IGNORECASE)
# nnU-Net takes the name CT only; vendors and datasets also write CTA and the like
CT_NAME = re.compile(r"^ct(?:a|p)?(?![a-z])", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """One reason why a case or a file of a dataset cannot be used.

    Attributes:
        case: name of the case, or name of the file without its suffix.
        message: what is wrong, with the path of the file.
        kind: kind of the problem, for programs.
    """

    case: str
    message: str
    kind: ProblemKind


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """The labelled cases of a dataset, and what the dataset states about them.

    Attributes:
        kind: name of the layout, for messages.
        cases: one per pair of image and label, each with `case`, `image` (a path, or a list with
            one path per channel) and `label` (a path). A single path may be a 4D file that holds
            all channels.
        labels: name → value, background first; None if the dataset does not define them. The value
            of a region is the one that is written for it, and later regions are written over
            earlier ones.
        label_names: value → name, of labels that label maps may have, for datasets that do not
            define which of them they do.
        regions: name of a region → the values in the label maps that make it up; empty if each
            label has one value of its own.
        ignore_label: value of voxels that nobody labelled; None if there is no such value.
        channels: names of the channels; None if the dataset does not define them.
        problems: one for each case or file that is not part of a pair.
        licence: licence of the data; empty if the dataset does not state it.
        file_ending: suffix of all images and label maps, as nnU-Net's dataset.json states it; empty
            if the dataset does not.
        folds: case → name of the fold that holds it out; empty if the dataset does not define them.
        subjects: case → subject, for cases whose subject the dataset states.
    """

    kind: str
    cases: list[Case]
    labels: dict[str, int] | None = None
    label_names: Mapping[int, str] = field(default_factory=dict)
    regions: dict[str, tuple[int, ...]] = field(default_factory=dict)
    ignore_label: int | None = None
    channels: tuple[str, ...] | None = None
    problems: list[Problem] = field(default_factory=list)
    licence: str = ""
    file_ending: str = ""
    folds: Mapping[str, str] = field(default_factory=dict)
    subjects: Mapping[str, str] = field(default_factory=dict)

    @property
    def values(self) -> set[int] | None:
        """All values that a label map may have; None if the dataset does not define them."""
        if self.labels is None:
            return None
        values = {0, *self.labels.values()}.union(*self.regions.values())
        return values if self.ignore_label is None else values | {self.ignore_label}

    @property
    def modalities(self) -> tuple[Modality, ...]:
        """Modality of each channel: CT where its name says so, else MR; one MR without names."""
        return tuple("CT" if CT_NAME.match(name) else "MR" for name in self.channels or ("",))


def volumes_in(folder: Path, ending: str = "") -> list[Path]:
    """Return the volumes directly in a folder, without hidden files, sorted by name.

    Of a pair of .hdr and .img only the .hdr is returned.

    Args:
        folder: the folder.
        ending: suffix that all volumes have; empty for any.
    """
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_file()
        and not path.name.startswith(".")
        and image_suffix(path) not in (None, ".img", ".img.gz")
        and path.name.endswith(ending)
    ]


def make_case(name: str, images: Sequence[Path], label: Path) -> Case:
    """Return the case of one label map and its images, one per channel or one for all."""
    paths = [str(path) for path in images]
    return {
        "case": name,
        "image": paths[0] if len(paths) == 1 else paths,
        "label": str(label),
    }


def pair_by_name(
    images: Mapping[str, Sequence[Path]], labels: Mapping[str, Path]
) -> tuple[list[Case], list[Problem]]:
    """Return the cases that have both images and a label, and a problem for each of the others.

    Args:
        images: case → its images, one per channel.
        labels: case → its label map.
    """
    cases = [
        make_case(name, images[name], labels[name])
        for name in sorted(images.keys() & labels.keys())
    ]
    problems = []
    for name in sorted(images.keys() - labels.keys()):
        message = f"{images[name][0]}: has no label"
        problems.append(Problem(case=name, message=message, kind="no_label"))
    for name in sorted(labels.keys() - images.keys()):
        message = f"{labels[name]}: has no image"
        problems.append(Problem(case=name, message=message, kind="no_image"))
    return cases, problems


def numbered_channels(
    paths: Collection[Path],
) -> tuple[dict[str, list[Path]], list[Problem]]:
    """Group files named CASE_0000, CASE_0001, … by case.

    Returns:
        Case → its files in the order of the channels, for cases with the channels that most cases
        have; and a problem for each other case, and for each file without a number.
    """
    files_of: dict[str, dict[int, Path]] = {}
    problems = []
    for path in paths:
        name = image_stem(path)
        match = CHANNEL_NAME.match(name)
        if match:
            files_of.setdefault(match[1], {})[int(match[2])] = path
        else:
            message = f"{path}: expected a name ending in a channel's number, such as _0000"
            problems.append(Problem(case=name, message=message, kind="channel_name"))
    counts = Counter(len(files) for files in files_of.values())
    # the dataset has as many channels as most of its cases
    count = counts.most_common(1)[0][0] if counts else 1
    images: dict[str, list[Path]] = {}
    for name, files in files_of.items():
        if sorted(files) == list(range(count)):
            images[name] = [files[number] for number in range(count)]
        else:
            message = f"has the channels {sorted(files)}, most cases have 0 to {count - 1}"
            problems.append(Problem(case=name, message=message, kind="channels"))
    return images, problems


def distinct_names(names: Sequence[str]) -> tuple[str, ...]:
    """Return names of channels, numbered where two are equal.

    >>> distinct_names(["MRI", "MRI", "CT"])
    ('MRI 0', 'MRI 1', 'CT')
    """
    counts = Counter(names)
    return tuple(
        name if counts[name] == 1 else f"{name} {number}" for number, name in enumerate(names)
    )
