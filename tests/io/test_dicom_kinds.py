"""Series of an exam that are no volumes are known by their headers; broken volumes are not."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import pytest
from dicom_files import Series, enhanced, make_localiser, make_series
from pydicom.uid import generate_uid

from pipeline.errors import ConfigError, PipelineError
from pipeline.io.cases import find_cases
from pipeline.io.dicom_discovery import find_series
from pipeline.io.discovery import named_files
from pipeline.io.reader import read
from pipeline.types import Case


class OneChannel:
    """A model of one channel."""

    channels = ("T1",)
    fallback_channel = None


def reason(folder: Path) -> str:
    """Return why the one series in a folder is no volume; empty if it may be one."""
    found = find_series(file.path for file in named_files(folder))
    (series,) = found.series
    return found.no_volumes.get(series.uid, "")


def _folder(case: Case) -> str:
    """Return the folder of a case's only series."""
    series: Any = case["image"]
    return str(series.folder)


def by_dcm2niix(folder: Path, out: Path, *options: str) -> list[int]:
    """Return the number of slices of each volume that dcm2niix makes of a folder."""
    dcm2niix = pytest.importorskip("dcm2niix")
    out.mkdir()
    command = [dcm2niix.bin, *options, "-b", "n", "-z", "n", "-f", "%s", "-o", out, folder]
    subprocess.run(list(map(str, command)), check=False, capture_output=True)
    return [nib.load(path).shape[2] for path in out.glob("*.nii")]


def changed(series: Series, **values: Any) -> Series:
    """Change attributes of all slices; None removes them."""

    def change(number: int, dataset: Any) -> None:
        for name, value in values.items():
            if value is None:
                delattr(dataset, name)
            else:
                setattr(dataset, name, value)

    return series.change(change)


def as_enhanced(series: Series, folder: Path) -> Path:
    folder.mkdir()
    enhanced(series).save_as(folder / "all.dcm")
    return folder


def numbered(series: Series, first: int) -> Series:
    """Number the images of a series from another one on."""
    return series.change(lambda number, item: setattr(item, "InstanceNumber", first + number))


DERIVED = ["DERIVED", "SECONDARY", "OTHER"]
NO_PLACE: dict[str, Any] = {"ImagePositionPatient": None, "ImageOrientationPatient": None}
NO_VOLUMES: dict[str, tuple[Callable[[], Series], str]] = {
    "said": (lambda: make_localiser(stated=True), r"localiser \(ImageType LOCALIZER\)"),
    "said of a volume": (
        lambda: changed(make_series(), ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]),
        r"localiser \(ImageType LOCALIZER\)",
    ),
    "three orientations": (make_localiser, "3 orientations, at most 3 of each"),
    "many of each": (lambda: make_localiser(count=15), "3 orientations, at most 15 of each"),
    "one slice": (lambda: make_series(count=1), "one slice"),
    "three slices": (lambda: make_series(count=3), "3 slices, too few"),
    "pictures": (
        lambda: changed(make_series(), ImageType=DERIVED, **NO_PLACE),
        "derived pictures without a place",
    ),
    "colours": (
        lambda: changed(
            make_series(),
            ImageType=DERIVED,
            SamplesPerPixel=3,
            PhotometricInterpretation="RGB",
            PlanarConfiguration=0,
        ),
        "derived pictures in colours",
    ),
}


@pytest.mark.parametrize("name", NO_VOLUMES)
def test_what_is_no_volume_has_a_reason(tmp_path: Path, name: str) -> None:
    make, words = NO_VOLUMES[name]
    folder = make().write(tmp_path / "in")
    make_series(7).write(tmp_path / "volume")  # or nothing is left to segment
    no_volume, volume = sorted(find_cases([tmp_path], OneChannel()), key=_folder)
    assert "left_out" not in volume
    assert no_volume["left_out"].startswith("no volume: ")
    assert re.search(words, no_volume["left_out"])
    assert reason(folder)


@pytest.mark.parametrize("name", ["one slice", "pictures"])
def test_dcm2niix_ignores_it_too(tmp_path: Path, name: str) -> None:
    """Asked to leave out what is derived, a localiser or no volume (`-i y`)."""
    folder = NO_VOLUMES[name][0]().write(tmp_path / "in")
    assert by_dcm2niix(folder, tmp_path / "out", "-i", "y") == []
    assert by_dcm2niix(make_series().write(tmp_path / "volume"), tmp_path / "2", "-i", "y") == [9]


def test_dcm2niix_finds_the_same_views(tmp_path: Path) -> None:
    folder = make_localiser(count=4).write(tmp_path / "in")
    assert "3 orientations, at most 4 of each" in reason(folder)
    assert by_dcm2niix(folder, tmp_path / "out") == [4, 4, 4]


def test_enhanced_localisers_are_known_by_their_frames(tmp_path: Path) -> None:
    single = make_series(count=1)
    assert reason(as_enhanced(single, tmp_path / "one")) == "one slice"
    assert reason(as_enhanced(make_series(), tmp_path / "volume")) == ""
    scout = as_enhanced(make_localiser(), tmp_path / "scout")
    assert "3 orientations" in reason(scout)


def _gap() -> Series:
    series = make_series()
    del series.slices[4]
    return series


def _two_stacks() -> Series:
    scout, stack = make_localiser(), make_series(count=16)
    changed(stack, SeriesInstanceUID=scout.uid)
    return Series([*scout.slices, *stack.slices])


def _cut() -> Series:
    series = make_series(count=24)
    return Series(series.slices[9:12])


MAY_BE_VOLUMES: dict[str, Callable[[], Series]] = {
    "volume": make_series,
    "missing slices": _gap,
    "three of 24 slices": _cut,
    "one of many slices": lambda: numbered(make_series(count=1), 88),
    "no place": lambda: changed(make_series(), **NO_PLACE),
    "no place of some": lambda: make_series().change(
        lambda number, item: delattr(item, "ImagePositionPatient") if number == 3 else None
    ),
    "derived, with places": lambda: changed(make_series(), ImageType=["DERIVED", "PRIMARY", "MPR"]),
    "mosaic": lambda: changed(
        make_series(count=1), ImageType=["ORIGINAL", "PRIMARY", "M", "MOSAIC"]
    ),
    "a stack among views": _two_stacks,
    "some are localisers": lambda: make_series().change(
        lambda number, item: (
            setattr(item, "ImageType", ["ORIGINAL", "PRIMARY", "LOCALIZER"]) if number else None
        )
    ),
    "a number that is none": lambda: changed(make_series(), InstanceNumber=None),
}


@pytest.mark.parametrize("name", MAY_BE_VOLUMES)
def test_volumes_and_broken_volumes_are_cases(tmp_path: Path, name: str) -> None:
    folder = MAY_BE_VOLUMES[name]().write(tmp_path / "in")
    assert reason(folder) == ""
    (case,) = find_cases([folder], OneChannel())
    assert "left_out" not in case


@pytest.mark.parametrize("name", ["missing slices", "no place", "mosaic", "a stack among views"])
def test_what_is_broken_still_fails(tmp_path: Path, name: str) -> None:
    folder = MAY_BE_VOLUMES[name]().write(tmp_path / "in")
    with pytest.raises(PipelineError):
        read(folder)


def test_a_cine_of_one_slice_is_one_slice(tmp_path: Path) -> None:
    first = make_series(count=1)
    for number in range(1, 30):
        again = make_series(number, count=1, uid=first.uid).slices[0]
        again.name += f"-{number}"
        again.dataset.InstanceNumber = number + 1
        first.slices.append(again)
    assert reason(first.write(tmp_path)) == "one slice"


def test_rounded_orientations_are_one(tmp_path: Path) -> None:
    def rounded(number: int, dataset: Any) -> None:
        dataset.ImageOrientationPatient = [
            f"{value:.{4 + number % 3}f}" for value in dataset.ImageOrientationPatient
        ]

    assert reason(make_series(count=16).change(rounded).write(tmp_path)) == ""


def test_copies_do_not_make_a_volume(tmp_path: Path) -> None:
    folder = make_series(count=3).write(tmp_path / "a")
    make = folder / "copies"
    make.mkdir()
    for path in folder.glob("IM*"):
        (make / path.name).write_bytes(path.read_bytes())
    assert reason(tmp_path) == "3 slices, too few for a volume"


def test_an_exam_without_a_volume_is_an_error(tmp_path: Path) -> None:
    scout = make_localiser()
    scout.write(tmp_path / "scout")
    with pytest.raises(
        ConfigError, match=r"nothing to segment.*3 orientations.*localiser"
    ) as caught:
        find_cases([tmp_path / "scout"], OneChannel())
    assert scout.uid in str(caught.value)
    for number in range(9):
        make_series(number, count=1).write(tmp_path / f"{number}")
    with pytest.raises(ConfigError, match="; and 5 more"):
        find_cases([tmp_path], OneChannel())


def test_other_objects_are_named_once(tmp_path: Path) -> None:
    """Also those in a series with images, whose name is the case of the images."""
    volume = make_series()
    pictures = changed(make_series(1), SOPClassUID="1.2.840.10008.5.1.4.1.1.7")
    same = changed(
        make_series(2, count=1),
        SOPClassUID="1.2.840.10008.5.1.4.1.1.66",
        SeriesInstanceUID=volume.uid,
    )
    for number, series in enumerate((volume, pictures, same)):
        series.write(tmp_path / str(number))
    cases = {case["case"]: case for case in find_cases([tmp_path], OneChannel())}
    assert set(cases) == {volume.uid, pictures.uid}
    assert "left_out" not in cases[volume.uid]
    text = "no MR images: 9 × Secondary Capture Image Storage"
    assert cases[pictures.uid]["left_out"] == text
    read_series: Any = cases[volume.uid]["image"]
    assert len(read_series.files) == len(volume.slices)


def test_a_listed_folder_is_read_whatever_it_is(tmp_path: Path) -> None:
    """Whoever names one image wants that one."""
    make_series(count=1, uid=generate_uid()).write(tmp_path / "one")
    (tmp_path / "cases.csv").write_text("case,image\nmine,one\n")
    (case,) = find_cases([tmp_path / "cases.csv"], OneChannel())
    assert "left_out" not in case
    assert read(tmp_path / "one").array.shape[2] == 1
