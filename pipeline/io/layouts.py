"""Finding pairs of image and label in the folder layouts that labelled datasets come in.

Four layouts are known: the Medical Segmentation Decathlon's dataset.json, nnU-Net's raw folder,
BIDS derivatives, and a folder of images next to a folder of labels.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pipeline.errors import ConfigError
from pipeline.io.formats import image_stem, image_suffix
from pipeline.io.tables import read_json
from pipeline.types import Case

ProblemKind = Literal[
    "missing_file",  # dataset.json lists a file that does not exist
    "not_listed",  # a file that dataset.json does not list
    "channel_name",  # a name without the number of a channel
    "channels",  # not the channels that most cases have
    "no_image",
    "no_label",
    "duplicate",  # a second label map, or the image of another case
    "unusable",  # a file that cannot be read, or that cannot be trained on
]

CHANNEL_NAME = re.compile(r"(.+)_(\d{4})$")
LABEL_ENDINGS = ("_dseg", "_seg", "_label", "_labels", "_mask")
BIDS_LABEL_NAME = re.compile(r"^(sub-[A-Za-z0-9]+(?:_[a-z]+-[A-Za-z0-9]+)*)_(?:dseg|mask)$")
BIDS_SESSION = re.compile(r"^(sub-[A-Za-z0-9]+(?:_ses-[A-Za-z0-9]+)?)")
# entities that only derivatives have: without them a label's name is that of its raw image
BIDS_DERIVED_ENTITIES = re.compile(r"_(space|desc|res|den|label)-[A-Za-z0-9]+")


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
    """The labelled cases of a dataset, and what its folder states about them.

    Attributes:
        kind: name of the folder layout, for messages.
        cases: one per pair of image and label, each with `case`, `image` (a path, or a list with
            one path per channel) and `label` (a path).
        labels: name → value, background first; None if the dataset does not define them.
        channels: names of the channels; None if the dataset does not define them.
        problems: one for each case or file that is not part of a pair.
        licence: licence of the data; empty if the dataset does not state it.
    """

    kind: str
    cases: list[Case]
    labels: dict[str, int] | None = None
    channels: tuple[str, ...] | None = None
    problems: list[Problem] = field(default_factory=list)
    licence: str = ""


def find_pairs(folders: Sequence[Path]) -> Layout:
    """Find the pairs of image and label of a dataset.

    Of a single folder, the first of these layouts that fits is taken:

    1. Decathlon: a dataset.json with a list `training`.
    2. nnU-Net: folders imagesTr and labelsTr.
    3. BIDS: a folder derivatives.
    4. Folders images and labels, or image and label.

    Args:
        folders: one folder in one of these layouts, or a folder of images and a folder of labels.

    Returns:
        The layout with all pairs, and with a problem for each file that is not part of one.

    Raises:
        ConfigError: a folder does not exist, its layout is unknown, its dataset.json cannot be
            read, or the number of folders is not 1 or 2.
    """
    if len(folders) not in (1, 2):
        named = ", ".join(str(folder) for folder in folders) or "no folder"
        raise ConfigError(
            f"{named}: expected one dataset folder, or a folder of images and a folder of labels"
        )
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(f"{folder}: no such folder")
    if len(folders) == 2:
        return _two_folders(*folders)
    root = folders[0]
    content = _read_dataset_json(root)
    if isinstance(content.get("training"), list):
        return _decathlon(root, content)
    if (root / "imagesTr").is_dir() and (root / "labelsTr").is_dir():
        return _nnunet(root, content)
    if (root / "derivatives").is_dir():
        return _bids(root)
    for images, labels in (("images", "labels"), ("image", "label")):
        if (root / images).is_dir() and (root / labels).is_dir():
            return _two_folders(root / images, root / labels)
    raise ConfigError(
        f"{root}: expected a Decathlon dataset.json, an nnU-Net folder (imagesTr, labelsTr), "
        "BIDS with derivatives, or folders images and labels; "
        "or name a folder of images and a folder of labels"
    )


def _read_dataset_json(root: Path) -> dict[str, Any]:
    """Return the content of a folder's dataset.json; an empty dict if there is none."""
    path = root / "dataset.json"
    content = read_json(path) if path.is_file() else {}
    # other programs use this file name too: without a mapping it describes no dataset, and the
    # folder may still have another layout
    return content if isinstance(content, dict) else {}


def _volumes_in(folder: Path) -> list[Path]:
    """Return the volumes directly in a folder, without hidden files.

    Of a pair of .hdr and .img only the .hdr is returned.
    """
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_file()
        and not path.name.startswith(".")
        and image_suffix(path) not in (None, ".img", ".img.gz")
    ]


def _decathlon(root: Path, content: dict[str, Any]) -> Layout:
    """Read the pairs that a Decathlon dataset.json lists."""
    cases: list[Case] = []
    problems: list[Problem] = []
    listed: set[Path] = set()
    for item in content["training"]:
        try:
            image, label = root / item["image"], root / item["label"]
        except (KeyError, TypeError) as error:
            raise ConfigError(
                f"{root}/dataset.json: expected pairs of `image` and `label` in `training`"
            ) from error
        name = image_stem(image)
        listed.update((image.resolve(), label.resolve()))
        missing = [str(path) for path in (image, label) if not path.is_file()]
        if missing:
            message = f"listed, and missing: {', '.join(missing)}"
            problems.append(Problem(case=name, message=message, kind="missing_file"))
        else:
            cases.append({"case": name, "image": str(image), "label": str(label)})
    return Layout(
        kind="Decathlon dataset.json",
        cases=cases,
        labels=_decathlon_labels(content.get("labels")),
        channels=tuple(_numbered_names(content.get("modality")).values()) or None,
        problems=problems + _unlisted(listed),
        licence=_licence(content),
    )


def _unlisted(listed: set[Path]) -> list[Problem]:
    """Return a problem for each volume that is not listed, in the folders of listed files."""
    problems = []
    for folder in sorted({path.parent for path in listed}):
        if not folder.is_dir():
            continue
        for path in _volumes_in(folder):
            if path.resolve() not in listed:
                message = f"{path} is not listed in dataset.json"
                problems.append(Problem(case=image_stem(path), message=message, kind="not_listed"))
    return problems


def _nnunet(root: Path, content: dict[str, Any]) -> Layout:
    """Pair imagesTr/CASE_0000.nii.gz, one file per channel, with labelsTr/CASE.nii.gz."""
    channel_files, problems = _nnunet_images(root / "imagesTr")
    counts = Counter(len(files) for files in channel_files.values())
    # the dataset has as many channels as most of its cases
    count = counts.most_common(1)[0][0] if counts else 1
    images: dict[str, list[Path]] = {}
    for name, files in channel_files.items():
        if sorted(files) == list(range(count)):
            images[name] = [files[number] for number in range(count)]
        else:
            message = f"has the channels {sorted(files)}, most cases have 0 to {count - 1}"
            problems.append(Problem(case=name, message=message, kind="channels"))
    labels = {image_stem(path): path for path in _volumes_in(root / "labelsTr")}
    cases, unpaired = _pair_by_name(images, labels)
    names = _numbered_names(content.get("channel_names") or content.get("modality"))
    return Layout(
        kind="nnU-Net raw folder",
        cases=cases,
        labels=_nnunet_labels(content.get("labels")),
        channels=tuple(names.get(number, f"channel {number}") for number in range(count)),
        problems=problems + unpaired,
        licence=_licence(content),
    )


def _nnunet_images(folder: Path) -> tuple[dict[str, dict[int, Path]], list[Problem]]:
    """Return case → channel number → file, and a problem for each file without a number."""
    files_of: dict[str, dict[int, Path]] = {}
    problems = []
    for path in _volumes_in(folder):
        name = image_stem(path)
        match = CHANNEL_NAME.match(name)
        if match:
            files_of.setdefault(match[1], {})[int(match[2])] = path
        else:
            message = f"{path}: expected a name ending in a channel's number, such as _0000"
            problems.append(Problem(case=name, message=message, kind="channel_name"))
    return files_of, problems


def _two_folders(images: Path, labels: Path) -> Layout:
    """Pair files of the same name; a label's name may also have one of `LABEL_ENDINGS`."""
    label_of = {}
    for path in _volumes_in(labels):
        name = image_stem(path)
        ending = next((ending for ending in LABEL_ENDINGS if name.endswith(ending)), "")
        label_of[name.removesuffix(ending)] = path
    images_of = {image_stem(path): [path] for path in _volumes_in(images)}
    cases, problems = _pair_by_name(images_of, label_of)
    return Layout(kind="a folder of images and one of labels", cases=cases, problems=problems)


def _bids(root: Path) -> Layout:
    """Pair each label map (_dseg, _mask) in derivatives with the raw images of its session.

    The channels are the suffixes (T1w, FLAIR, …) that all labelled sessions have.
    """
    raw = _bids_raw_images(root)
    label_of: dict[str, Path] = {}
    images_of: dict[str, dict[str, Path]] = {}
    problems = []
    for path in _bids_files(root / "derivatives"):
        match = BIDS_LABEL_NAME.match(image_stem(path))
        if match is None:
            continue
        name = BIDS_DERIVED_ENTITIES.sub("", match[1])
        images = raw.get(_bids_session(name), {})
        if name in label_of:
            message = f"{path}: a second label map of this session"
            problems.append(Problem(case=name, message=message, kind="duplicate"))
        elif not images:
            message = f"{path}: no raw image of this session"
            problems.append(Problem(case=name, message=message, kind="no_image"))
        else:
            label_of[name], images_of[name] = path, images
    channels = _shared_channels(root, list(images_of.values()))
    cases: list[Case] = []
    for name, images in images_of.items():
        paths = [images[channel] for channel in channels]
        cases.append(_case(name, paths, label_of[name]))
    return Layout(kind="BIDS derivatives", cases=cases, channels=channels, problems=problems)


def _bids_files(folder: Path) -> list[Path]:
    return [p for p in sorted(folder.rglob("sub-*")) if p.is_file() and image_suffix(p)]


def _bids_session(name: str) -> str:
    """Return subject and session of a BIDS name, such as `sub-01_ses-1`; "" for other names."""
    match = BIDS_SESSION.match(name)
    return match[1] if match else ""


def _bids_raw_images(root: Path) -> dict[str, dict[str, Path]]:
    """Return session → suffix (T1w, FLAIR, …) → path of the image, without derivatives."""
    raw: dict[str, dict[str, Path]] = {}
    for path in _bids_files(root):
        name = image_stem(path)
        session = _bids_session(name)
        if session and root / "derivatives" not in path.parents:
            raw.setdefault(session, {})[name.rpartition("_")[2]] = path
    return raw


def _shared_channels(root: Path, sessions: Sequence[dict[str, Path]]) -> tuple[str, ...]:
    """Return the suffixes that all sessions have, sorted."""
    if not sessions:
        return ()
    shared = set(sessions[0]).intersection(*sessions[1:])
    if not shared:
        raise ConfigError(f"{root}: no contrast (T1w, FLAIR, …) that every labelled session has")
    return tuple(sorted(shared))


def _pair_by_name(
    images: dict[str, list[Path]], labels: dict[str, Path]
) -> tuple[list[Case], list[Problem]]:
    """Return the cases that have both images and a label, and a problem for each of the others."""
    cases = [
        _case(name, images[name], labels[name]) for name in sorted(images.keys() & labels.keys())
    ]
    problems = []
    for name in sorted(images.keys() - labels.keys()):
        message = f"{images[name][0]}: has no label"
        problems.append(Problem(case=name, message=message, kind="no_label"))
    for name in sorted(labels.keys() - images.keys()):
        message = f"{labels[name]}: has no image"
        problems.append(Problem(case=name, message=message, kind="no_image"))
    return cases, problems


def _case(name: str, images: Sequence[Path], label: Path) -> Case:
    paths = [str(path) for path in images]
    return {
        "case": name,
        "image": paths[0] if len(paths) == 1 else paths,
        "label": str(label),
    }


def _licence(content: dict[str, Any]) -> str:
    return str(content.get("licence") or content.get("license") or "")


def _numbered_names(content: Any) -> dict[int, str]:
    """Return number → name from a mapping such as {"0": "MRI"}, without keys that are no number."""
    if not isinstance(content, dict):
        return {}
    return {int(key): str(name) for key, name in content.items() if str(key).isdigit()}


def _decathlon_labels(content: Any) -> dict[str, int] | None:
    """Return name → value from the `labels` of a Decathlon dataset.json, which has value → name."""
    return _ordered_labels({name: value for value, name in _numbered_names(content).items()})


def _nnunet_labels(content: Any) -> dict[str, int] | None:
    """Return name → value from the `labels` of an nnU-Net dataset.json.

    Regions, which have a list of values, are left out.
    """
    labels = content or {}
    return _ordered_labels({name: v for name, v in labels.items() if isinstance(v, int)})


def _ordered_labels(labels: dict[str, int]) -> dict[str, int] | None:
    """Return the labels by increasing value, value 0 as `background`; None without a value 0."""
    if 0 not in labels.values():
        return None
    ordered = sorted(labels.items(), key=lambda item: item[1])
    return {("background" if value == 0 else name): value for name, value in ordered}
