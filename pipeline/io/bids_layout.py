"""BIDS datasets with label maps in their derivatives.

References:
    Gorgolewski et al.: The brain imaging data structure. Scientific Data 3, 160044 (2016),
    doi:10.1038/sdata.2016.44.
    Segmentations in derivatives: https://bids-specification.readthedocs.io.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from pipeline.errors import ConfigError
from pipeline.io.formats import image_stem, image_suffix
from pipeline.io.layout import Layout, Problem, make_case
from pipeline.io.tables import read_csv
from pipeline.types import Case

LABEL_NAME = re.compile(r"^(sub-[A-Za-z0-9]+(?:_[a-z]+-[A-Za-z0-9]+)*)_(?:dseg|mask)$")
SESSION = re.compile(r"^(sub-[A-Za-z0-9]+(?:_ses-[A-Za-z0-9]+)?)")
# entities that only derivatives have: without them a label's name is that of its raw image
DERIVED_ENTITIES = re.compile(r"_(space|desc|res|den|label|seg)-[A-Za-z0-9]+")
LABEL_TABLE_ENDING = "dseg.tsv"


def bids_layout(root: Path) -> Layout:
    """Pair each label map (_dseg, _mask) in derivatives with the raw images of its session.

    The channels are the suffixes (T1w, FLAIR, …) that all labelled sessions have. Of several raw
    images with one suffix, that with the label's own entities (run, acq, …) is taken. The names of
    the labels are those of a dseg.tsv in derivatives.
    """
    raw = _raw_images(root)
    label_of: dict[str, Path] = {}
    images_of: dict[str, dict[str, Path]] = {}
    problems = []
    for path in _files(root / "derivatives"):
        match = LABEL_NAME.match(image_stem(path))
        if match is None:
            continue
        name = DERIVED_ENTITIES.sub("", match[1])
        images = _images_of_label(name, raw.get(_session(name), []))
        if name in label_of:
            message = f"{path}: a second label map of this session, after {label_of[name]}"
            problems.append(Problem(case=name, message=message, kind="duplicate"))
        elif not images:
            message = f"{path}: no raw image of this session"
            problems.append(Problem(case=name, message=message, kind="no_image"))
        else:
            label_of[name], images_of[name] = path, images
    channels = _shared_channels(root, list(images_of.values()))
    cases: list[Case] = []
    for name, images in images_of.items():
        cases.append(make_case(name, [images[channel] for channel in channels], label_of[name]))
    return Layout(
        kind="BIDS derivatives",
        cases=cases,
        label_names=_label_names(root / "derivatives"),
        channels=channels,
        problems=problems,
    )


def _files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("sub-*")) if path.is_file() and image_suffix(path)]


def _session(name: str) -> str:
    """Return subject and session of a BIDS name, such as `sub-01_ses-1`; "" for other names."""
    match = SESSION.match(name)
    return match[1] if match else ""


def _raw_images(root: Path) -> dict[str, list[Path]]:
    """Return session → its images, without derivatives."""
    raw: dict[str, list[Path]] = {}
    for path in _files(root):
        session = _session(image_stem(path))
        if session and root / "derivatives" not in path.parents:
            raw.setdefault(session, []).append(path)
    return raw


def _images_of_label(name: str, images: Sequence[Path]) -> dict[str, Path]:
    """Return suffix → the raw image of a label: the one with most of the label's entities.

    Args:
        name: name of the label, without its suffix and the entities of derivatives.
        images: raw images of the label's session.
    """
    entities = set(name.split("_"))
    found: dict[str, tuple[int, Path]] = {}
    for path in images:
        *own, suffix = image_stem(path).split("_")
        score = len(entities & set(own)) - len(set(own) - entities)
        if suffix not in found or score > found[suffix][0]:
            found[suffix] = (score, path)
    return {suffix: path for suffix, (_, path) in found.items()}


def _shared_channels(root: Path, sessions: Sequence[dict[str, Path]]) -> tuple[str, ...]:
    """Return the suffixes that all sessions have, sorted."""
    if not sessions:
        return ()
    shared = set(sessions[0]).intersection(*sessions[1:])
    if not shared:
        raise ConfigError(f"{root}: no contrast (T1w, FLAIR, …) that every labelled session has")
    return tuple(sorted(shared))


def _label_names(derivatives: Path) -> dict[int, str]:
    """Return value → name, from the first dseg.tsv; empty if there is none.

    Raises:
        ConfigError: a value in it is no whole number.
    """
    tables = sorted(derivatives.rglob(f"*{LABEL_TABLE_ENDING}"), key=lambda path: len(path.parts))
    names: dict[int, str] = {}
    for row in read_csv(tables[0], delimiter="\t") if tables else []:
        value, name = (row.get("index") or "").strip(), (row.get("name") or "").strip()
        if not value.isdigit() or not name:
            raise ConfigError(
                f"{tables[0]}: expected columns index and name, a whole number and a name in each "
                f"row, got {value!r} and {name!r}"
            )
        names[int(value)] = name
    return names
