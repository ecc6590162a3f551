"""Datasets with a dataset.json: the Decathlon's, and the raw folders of nnU-Net 1 and 2.

References:
    Decathlon: Antonelli et al.: The Medical Segmentation Decathlon. Nature Communications 13, 4128
        (2022), doi:10.1038/s41467-022-30695-9.
    nnU-Net 2: documentation/dataset_format.md, region_based_training.md and ignore_label.md in
        https://github.com/MIC-DKFZ/nnUNet; nnU-Net 1: its dataset_conversion.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError
from pipeline.io.formats import SUFFIXES, image_stem, image_suffix
from pipeline.io.layout import (
    Layout,
    Problem,
    distinct_names,
    make_case,
    numbered_channels,
    pair_by_name,
    volumes_in,
)
from pipeline.io.tables import read_json
from pipeline.types import Case

IMAGES, LABELS = "imagesTr", "labelsTr"
IGNORE = "ignore"  # nnU-Net's name of the label of voxels that nobody labelled


@dataclass(frozen=True, kw_only=True, slots=True)
class _LabelNames:
    """Labels as `Layout` has them."""

    labels: dict[str, int] | None = None
    regions: dict[str, tuple[int, ...]] = field(default_factory=dict)
    ignore_label: int | None = None


def read_dataset_json(root: Path) -> dict[str, Any]:
    """Return the content of a folder's dataset.json; an empty dict if there is none."""
    path = root / "dataset.json"
    content = read_json(path) if path.is_file() else {}
    # other programs use this file name too: without a mapping it describes no dataset, and the
    # folder may still have another layout
    return content if isinstance(content, dict) else {}


def listed_layout(root: Path, content: dict[str, Any]) -> Layout:
    """Return the pairs that `training` of a dataset.json lists, for the Decathlon and nnU-Net 1.

    An image is one file, which may hold several channels as volumes, or the files IMAGE_0000,
    IMAGE_0001, … of nnU-Net 1, whose list leaves the number out.
    """
    cases: list[Case] = []
    problems: list[Problem] = []
    used: set[Path] = set()
    numbered = False
    for item in content["training"]:
        image, label = _listed_pair(root, item)
        images = [image] if image.is_file() else _channel_files(image)
        name = image_stem(image)
        used.update(path.resolve() for path in (image, label, *images))
        missing = [str(path) for path in (image, label) if not path.is_file()]
        if images and label.is_file():
            numbered = numbered or image not in images
            cases.append(make_case(name, images, label))
        else:
            message = f"listed, and missing: {', '.join(missing)}"
            problems.append(Problem(case=name, message=message, kind="missing_file"))
    cases, unequal = _with_equal_channels(cases)
    return _layout(
        "nnU-Net 1 raw folder" if numbered else "Decathlon dataset.json",
        content,
        cases,
        problems + unequal + _unlisted(used),
    )


def _listed_pair(root: Path, item: Any) -> tuple[Path, Path]:
    """Return the paths in one item of `training`.

    Raises:
        ConfigError: it is no pair.
    """
    try:
        return root / item["image"], root / item["label"]
    except (KeyError, TypeError) as error:
        raise ConfigError(
            f"{root}/dataset.json: expected pairs of `image` and `label` in `training`"
        ) from error


def _channel_files(image: Path) -> list[Path]:
    """Return the files NAME_0000, NAME_0001, … of an image that is listed as NAME."""
    stem, suffix = image_stem(image), image.name.removeprefix(image_stem(image))
    files: list[Path] = []
    while (path := image.with_name(f"{stem}_{len(files):04}{suffix}")).is_file():
        files.append(path)
    return files


def _with_equal_channels(cases: Sequence[Case]) -> tuple[list[Case], list[Problem]]:
    """Return the cases with as many files as most have, and a problem for each other one."""
    counts = [len(case["image"]) if isinstance(case["image"], list) else 1 for case in cases]
    usual = max(set(counts), key=counts.count, default=1)
    kept, problems = [], []
    for case, count in zip(cases, counts, strict=True):
        if count == usual:
            kept.append(case)
        else:
            message = f"has {count} channels, most cases have {usual}"
            problems.append(Problem(case=case["case"], message=message, kind="channels"))
    return kept, problems


def _unlisted(listed: set[Path]) -> list[Problem]:
    """Return a problem for each volume that is not listed, in the folders of listed files."""
    problems = []
    for folder in sorted({path.parent for path in listed}):
        if not folder.is_dir():
            continue
        for path in volumes_in(folder):
            if path.resolve() not in listed:
                message = f"{path} is not listed in dataset.json"
                problems.append(Problem(case=image_stem(path), message=message, kind="not_listed"))
    return problems


def nnunet_layout(root: Path, content: dict[str, Any]) -> Layout:
    """Pair imagesTr/CASE_0000.nii.gz, one file per channel, with labelsTr/CASE.nii.gz.

    A `dataset` in dataset.json, which names the files of each case, counts more than the folders.
    """
    ending = _file_ending(root, content)
    if isinstance(content.get("dataset"), dict):
        cases, problems = _cases_by_path(root, content["dataset"])
    else:
        images, problems = numbered_channels(volumes_in(root / IMAGES, ending))
        labels = {image_stem(path): path for path in volumes_in(root / LABELS, ending)}
        cases, unpaired = pair_by_name(images, labels)
        problems += unpaired
    return _layout("nnU-Net raw folder", content, cases, problems)


def _file_ending(root: Path, content: dict[str, Any]) -> str:
    ending = str(content.get("file_ending") or "")
    if ending and image_suffix(Path(f"x{ending}")) is None:
        raise ConfigError(
            f"{root}/dataset.json: file_ending is {ending}, expected one of {', '.join(SUFFIXES)}; "
            "convert the files first"
        )
    return ending


def _cases_by_path(root: Path, content: dict[str, Any]) -> tuple[list[Case], list[Problem]]:
    """Return the cases of nnU-Net's `dataset`: case → `images` and `label`, relative to the folder.

    Raises:
        ConfigError: a case has no such entries.
    """
    cases: list[Case] = []
    problems: list[Problem] = []
    for name, item in content.items():
        try:
            images, label = [root / path for path in item["images"]], root / item["label"]
        except (KeyError, TypeError) as error:
            raise ConfigError(
                f"{root}/dataset.json: expected `images` and `label` in dataset.{name}"
            ) from error
        missing = [str(path) for path in (*images, label) if not path.is_file()]
        if missing or not images:
            message = f"listed, and missing: {', '.join(missing) or 'its images'}"
            problems.append(Problem(case=name, message=message, kind="missing_file"))
        else:
            cases.append(make_case(name, images, label))
    kept, unequal = _with_equal_channels(cases)
    return kept, problems + unequal


def _layout(
    kind: str, content: dict[str, Any], cases: list[Case], problems: list[Problem]
) -> Layout:
    """Return the layout of these cases, with what dataset.json says of labels and channels."""
    names = _label_names(content)
    return Layout(
        kind=kind,
        cases=cases,
        labels=names.labels,
        regions=names.regions,
        ignore_label=names.ignore_label,
        channels=_channels(content, cases),
        problems=problems,
        licence=str(content.get("licence") or content.get("license") or ""),
        file_ending=str(content.get("file_ending") or ""),
    )


def _channels(content: dict[str, Any], cases: Sequence[Case]) -> tuple[str, ...] | None:
    """Return the names of the channels, from `channel_names` of nnU-Net 2 or from `modality`."""
    names = content.get("channel_names") or content.get("modality")
    files = 1
    if cases and isinstance(cases[0]["image"], list):
        files = len(cases[0]["image"])
    if isinstance(names, str):
        names = {"0": names}
    if not isinstance(names, dict) or not all(str(key).isdigit() for key in names):
        return None if files == 1 else tuple(f"channel {number}" for number in range(files))
    named = {int(key): str(name) for key, name in names.items()}
    # a single file may hold all channels; several files are one channel each
    count = max(files, len(named)) if files == 1 else files
    return distinct_names([named.get(number, f"channel {number}") for number in range(count)])


def _label_names(content: dict[str, Any]) -> _LabelNames:
    """Return what `labels` says: value → name (Decathlon, nnU-Net 1), or name → value or values.

    Raises:
        ConfigError: a value is no whole number, or regions and their order do not fit.
    """
    given = content.get("labels")
    if not isinstance(given, dict) or not given:
        return _LabelNames()
    if all(_is_number(key) for key in given):
        values = {str(name): [int(value)] for value, name in given.items()}
        # a value is a class here, whatever its name
        return _LabelNames(labels=_ordered(values))
    values = {str(name): _values(name, value) for name, value in given.items()}
    ignored = values.pop(IGNORE, None)
    ignore_label = None if ignored is None else ignored[0]
    if all(len(found) == 1 for found in values.values()):
        return _LabelNames(labels=_ordered(values), ignore_label=ignore_label)
    regions = {name: tuple(found) for name, found in values.items() if found != [0]}
    written = _written_values(regions, content.get("regions_class_order"))
    return _LabelNames(
        labels={"background": 0, **written}, regions=regions, ignore_label=ignore_label
    )


def _is_number(value: Any) -> bool:
    return str(value).removeprefix("-").isdigit()


def _values(name: str, value: Any) -> list[int]:
    """Return the values of one label of nnU-Net 2."""
    values = value if isinstance(value, list) else [value]
    if not values or not all(_is_number(number) for number in values):
        raise ConfigError(
            f"dataset.json, labels.{name}: expected a whole number or a list of them, got {value!r}"
        )
    return [int(number) for number in values]


def _ordered(values: dict[str, list[int]]) -> dict[str, int] | None:
    """Return the labels by increasing value, value 0 as `background`; None without a value 0."""
    labels = {name: found[0] for name, found in values.items()}
    if 0 not in labels.values():
        return None
    ordered = sorted(labels.items(), key=lambda item: item[1])
    return {("background" if value == 0 else name): value for name, value in ordered}


def _written_values(regions: dict[str, tuple[int, ...]], order: Any) -> dict[str, int]:
    """Return region → the value that is written for it.

    Without an order each region is written with its first value that no later region has, so that
    the regions written one over the other give back the label maps.

    Args:
        regions: region → its values in the label maps, in the order of dataset.json.
        order: `regions_class_order` of dataset.json: one value per region; None if it is missing.

    Raises:
        ConfigError: the order does not have one value per region.
    """
    if order is not None:
        if not isinstance(order, list) or len(order) != len(regions):
            raise ConfigError(
                f"dataset.json, regions_class_order: expected {len(regions)} values, one for each "
                f"of {', '.join(regions)}, got {order!r}"
            )
        return {name: int(value) for name, value in zip(regions, order, strict=True)}
    written: dict[str, int] = {}
    later: set[int] = set()
    for name, values in reversed(list(regions.items())):
        own = [value for value in values if value not in later]
        if not own:
            raise ConfigError(
                f"dataset.json: the values of {name} are all in later regions; "
                "give regions_class_order, one value per region"
            )
        written[name] = own[0]
        later.update(values)
    return {name: written[name] for name in regions}
