"""Folders of labelled volumes as people keep them: the Decathlon's, nnU-Net's, BIDS derivatives, or two folders."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError
from pipeline.io.reader import image_stem, image_suffix
from pipeline.io.tables import read_json
from pipeline.types import Case

CHANNEL = re.compile(r"(.+)_(\d{4})$")
MISSING = "listed, and missing:"
LABEL_ENDINGS = ("_dseg", "_seg", "_label", "_labels", "_mask")
BIDS_LABELS = re.compile(r"^(sub-[A-Za-z0-9]+(?:_[a-z]+-[A-Za-z0-9]+)*)_(?:dseg|mask)$")
BIDS_PLACE = re.compile(r"^(sub-[A-Za-z0-9]+(?:_ses-[A-Za-z0-9]+)?)")
DERIVED = re.compile(
    r"_(space|desc|res|den|label)-[A-Za-z0-9]+"
)  # entities that a raw image does not have


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """What a folder of labelled volumes holds.

    Attributes:
        kind: how it is laid out, in words.
        cases: with `case`, `image` (a path, or a list of them, one a channel) and `label`.
        labels: name → value, where the folder says; background first.
        channels: their names, where the folder says.
        problems: (case or file, what is wrong) of all that is no pair.
        licence: of the data, where the folder says.
    """

    kind: str
    cases: list[Case]
    labels: dict[str, int] | None = None
    channels: tuple[str, ...] | None = None
    problems: list[tuple[str, str]] = field(default_factory=list)
    licence: str = ""


def find_pairs(places: Sequence[Path]) -> Layout:
    """The pairs of image and label in one folder, or in a folder of images and one of labels.

    Raises:
        ConfigError: no such folder, or none of the layouts that are known.
    """
    for place in places:
        if not place.is_dir():
            raise ConfigError(f"{place}: no such folder")
    if len(places) == 2:
        return _two_folders(*places)
    (root,) = places
    content = read_json(root / "dataset.json") if (root / "dataset.json").is_file() else {}
    if isinstance(content, dict) and isinstance(content.get("training"), list):
        return _decathlon(root, content)
    if (root / "imagesTr").is_dir() and (root / "labelsTr").is_dir():
        return _nnunet(root, content if isinstance(content, dict) else {})
    if (root / "derivatives").is_dir():
        return _bids(root)
    for images, labels in (("images", "labels"), ("image", "label")):
        if (root / images).is_dir() and (root / labels).is_dir():
            return _two_folders(root / images, root / labels)
    raise ConfigError(
        f"{root}: expected a Decathlon dataset.json, an nnU-Net folder (imagesTr, labelsTr), BIDS with derivatives, or folders "
        "images and labels; or name a folder of images and a folder of labels"
    )


def _volumes(folder: Path) -> list[Path]:
    """The volumes right in a folder; hidden files and the .img of a pair are none."""
    found = (p for p in sorted(folder.iterdir()) if p.is_file() and not p.name.startswith("."))
    return [p for p in found if image_suffix(p) not in (None, ".img", ".img.gz")]


def _decathlon(root: Path, content: dict[str, Any]) -> Layout:
    """What a dataset.json lists; volumes it does not list are told."""
    cases, problems, listed = [], [], set()
    for item in content["training"]:
        try:
            pair = {key: root / item[key] for key in ("image", "label")}
        except (KeyError, TypeError) as error:
            raise ConfigError(
                f"{root}/dataset.json: expected pairs of `image` and `label` in `training`"
            ) from error
        name = image_stem(pair["image"])
        missing = [str(path) for path in pair.values() if not path.is_file()]
        listed |= {path.resolve() for path in pair.values()}
        if missing:
            problems.append((name, f"{MISSING} {', '.join(missing)}"))
        else:
            cases.append({"case": name, **{key: str(path) for key, path in pair.items()}})
    folders = {path.parent for path in listed if path.parent.is_dir()}
    extra = [p for folder in sorted(folders) for p in _volumes(folder) if p.resolve() not in listed]
    problems += [(image_stem(path), f"{path} is not listed in dataset.json") for path in extra]
    channels = tuple(_named(content.get("modality")).values()) or None
    return Layout(
        kind="Decathlon dataset.json",
        cases=cases,
        labels=_labels({name: value for value, name in _named(content.get("labels")).items()}),
        channels=channels,
        problems=problems,
        licence=str(content.get("licence") or content.get("license") or ""),
    )


def _nnunet(root: Path, content: dict[str, Any]) -> Layout:
    """imagesTr/CASE_0000.nii.gz, one a channel, and labelsTr/CASE.nii.gz."""
    images: dict[str, dict[int, Path]] = {}
    problems = []
    for path in _volumes(root / "imagesTr"):
        match = CHANNEL.match(image_stem(path))
        if match is None:
            problems.append(
                (
                    image_stem(path),
                    f"{path}: expected a name ending in a channel's number, such as _0000",
                )
            )
        else:
            images.setdefault(match[1], {})[int(match[2])] = path
    labels = {image_stem(path): path for path in _volumes(root / "labelsTr")}
    count = Counter(len(found) for found in images.values()).most_common(1)[0][0] if images else 1
    whole = {}
    for name, found in images.items():
        if sorted(found) == list(range(count)):
            whole[name] = [found[i] for i in range(count)]
        else:
            problems.append(
                (name, f"has the channels {sorted(found)}, most cases have 0 to {count - 1}")
            )
    names = _named(content.get("channel_names") or content.get("modality"))
    cases, lone = _paired(whole, labels)
    given = content.get("labels") or {}
    return Layout(
        kind="nnU-Net raw folder",
        cases=cases,
        labels=_labels({name: value for name, value in given.items() if isinstance(value, int)})
        if given
        else None,
        channels=tuple(names.get(i, f"channel {i}") for i in range(count)),
        problems=problems + lone,
        licence=str(content.get("licence") or content.get("license") or ""),
    )


def _two_folders(images: Path, labels: Path) -> Layout:
    """Files of one name; the label's may end in _seg, _dseg, _label or _mask."""
    there = {}
    for path in _volumes(labels):
        name = image_stem(path)
        ending = next((e for e in LABEL_ENDINGS if name.endswith(e)), "")
        there[name.removesuffix(ending)] = path
    cases, problems = _paired({image_stem(path): [path] for path in _volumes(images)}, there)
    return Layout(kind="a folder of images and one of labels", cases=cases, problems=problems)


def _bids(root: Path) -> Layout:
    """Label maps (_dseg, _mask) anywhere in derivatives, each with the raw images of its subject and session.

    Channels are the suffixes (T1w, FLAIR, …) that all labelled sessions have.
    """
    labels = [
        (match[1], path)
        for path in _below(root / "derivatives")
        if (match := BIDS_LABELS.match(image_stem(path)))
    ]
    raw: dict[str, dict[str, Path]] = {}
    for path in _below(root):
        place = BIDS_PLACE.match(image_stem(path))
        if place and (root / "derivatives") not in path.parents:
            raw.setdefault(place[1], {})[image_stem(path).rpartition("_")[2]] = path
    problems, found = [], {}
    for entities, path in labels:
        own = DERIVED.sub("", entities)
        place = BIDS_PLACE.match(own)
        images = raw.get(place[1], {}) if place else {}
        if own in found:
            problems.append((own, f"{path}: a second label map of this session"))
        elif not images:
            problems.append((own, f"{path}: no raw image of this session"))
        else:
            found[own] = (images, path)
    shared = set.intersection(*(set(images) for images, _ in found.values())) if found else set()
    if found and not shared:
        raise ConfigError(f"{root}: no contrast (T1w, FLAIR, …) that every labelled session has")
    channels = tuple(sorted(shared))
    cases = [
        {
            "case": name,
            "image": _one_or_list([str(images[c]) for c in channels]),
            "label": str(path),
        }
        for name, (images, path) in found.items()
    ]
    return Layout(kind="BIDS derivatives", cases=cases, channels=channels, problems=problems)


def _below(folder: Path) -> list[Path]:
    return [p for p in sorted(folder.rglob("sub-*")) if p.is_file() and image_suffix(p)]


def _paired(
    images: dict[str, list[Path]], labels: dict[str, Path]
) -> tuple[list[Case], list[tuple[str, str]]]:
    """Cases of the names that both have, and what only one has."""
    cases = [
        {"case": name, "image": _one_or_list([str(p) for p in paths]), "label": str(labels[name])}
        for name, paths in sorted(images.items())
        if name in labels
    ]
    problems = [
        (name, f"{images[name][0]}: has no label") for name in sorted(set(images) - set(labels))
    ]
    return cases, problems + [
        (name, f"{labels[name]}: has no image") for name in sorted(set(labels) - set(images))
    ]


def _one_or_list(paths: list[str]) -> str | list[str]:
    return paths[0] if len(paths) == 1 else paths


def _named(content: Any) -> dict[int, str]:
    """{"0": "MRI"} as JSON has it, by number."""
    if not isinstance(content, dict):
        return {}
    return {int(key): str(name) for key, name in content.items() if str(key).isdigit()}


def _labels(found: dict[str, int]) -> dict[str, int] | None:
    """Names and values in the order of the values, the background named so."""
    if 0 not in found.values():
        return None
    ordered: Iterable[tuple[str, int]] = sorted(found.items(), key=lambda pair: pair[1])
    return {("background" if value == 0 else name): value for name, value in ordered}
