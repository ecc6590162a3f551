from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from phantom import nifti, oblique, save, smooth

from pipeline.cli.app import main
from pipeline.errors import VolumeError
from pipeline.io.case_warnings import warnings_of
from pipeline.io.tables import read_csv
from pipeline.transforms.checks import CheckVolumed, check_affine, check_values, looks_like_labels
from pipeline.transforms.loading import LoadVolumed
from pipeline.types import Affine, Array


def with_values(count: int, value: float) -> Array:
    array = smooth()
    array.reshape(-1)[:: array.size // count][:count] = value
    return array


def checked(image: Any) -> Any:
    return CheckVolumed("image")(LoadVolumed("image")({"image": image}))["image"]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("count", [1, 85])
def test_a_few_voxels_that_are_not_finite_are_replaced(value: float, count: int) -> None:
    """They get the smallest finite value, other voxels are unchanged, and a warning counts them."""
    array = with_values(count, value)
    image = checked(nifti(array))
    good = np.isfinite(array)
    np.testing.assert_array_equal(np.asarray(image[0])[good], array[good])
    assert (np.asarray(image[0])[~good] == array[good].min()).all()
    assert warnings_of(image.meta) == (
        f"{count} voxels were NaN or infinite and were set to the smallest value",
    )


def sheared(degrees: float) -> Affine:
    affine = oblique()
    shear = np.eye(3)
    shear[0, 1] = 1 / np.tan(np.radians(degrees))
    affine[:3, :3] = oblique((1, 1, 1))[:3, :3] @ shear * 1.5
    return affine


def flat() -> Affine:
    affine = oblique()
    affine[:3, 2] = affine[:3, 0] + affine[:3, 1]
    return affine


@pytest.mark.parametrize(
    ("affine", "says"),
    [
        (
            oblique((0.0, 1.0, 2.0)),
            "the spacing is 0 × 1 × 2 mm, expected above 0; set the file's sform or qform",
        ),
        (
            oblique((0.001, 0.001, 0.002)),
            "the spacing is 0.001 × 0.001 × 0.002 mm, expected 0.05 to 20.0; is the header in",
        ),
        (
            oblique((900.0, 900.0, 2000.0)),
            "the spacing is 900 × 900 × 2000 mm, expected 0.05 to 20.0; is the header in metres",
        ),
        (sheared(80), r"the affine is sheared: two axes meet at 80.0°, expected 90°"),
        (flat(), "the affine is singular: its axes lie in one plane"),
        (np.full((4, 4), np.nan), "the affine holds NaN or infinity"),
    ],
)
def test_implausible_affines_are_refused(affine: Affine, says: str) -> None:
    """Zero or implausible spacing, shear and singular axes have their own messages."""
    with pytest.raises(VolumeError) as raised:
        check_affine(affine)
    assert says in str(raised.value)


@pytest.mark.parametrize(
    "affine", [oblique(), oblique((0.2, 0.2, 19.0)), oblique().astype(np.float32), sheared(89.7)]
)
def test_affines_of_real_scanners_pass(affine: Affine) -> None:
    """Rounding in a float32 header is not taken for shear; thick slices are accepted."""
    check_affine(np.asarray(affine, dtype=np.float64))


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (np.zeros((5, 6, 7)), "the volume is empty: every voxel is 0; expected an image"),
        (np.full((5, 6, 7), 3.5), "the volume is constant: every voxel is 3.5; expected an image"),
        (np.zeros((5, 0, 7)), "the volume has shape (5, 0, 7): it holds no voxels"),
        (
            np.full((5, 6, 7), np.nan),
            "210 voxels (100.0%) are NaN or infinite, expected at most 1%",
        ),
        (
            with_values(500, np.nan),
            "500 voxels (5.8%) are NaN or infinite, expected at most 1%; where they mark the "
            "background",
        ),
        (
            np.rint(smooth() / 100).clip(0, 3),
            "the volume looks like a label map (few whole numbers, in even patches)",
        ),
        ((smooth() > 100) * 1.0, "the volume looks like a label map"),
    ],
)
def test_values_that_cannot_be_segmented_are_refused(array: Array, says: str) -> None:
    """Empty, constant, mostly NaN and label maps have their own messages."""
    with pytest.raises(VolumeError) as raised:
        check_values(torch.from_numpy(np.array(array, dtype=np.float32)))
    assert says in str(raised.value)


def test_the_message_names_the_channel(tmp_path: Path) -> None:
    """The message names the file of the bad channel."""
    paths = [
        save(tmp_path / "T1w.nii.gz"),
        save(tmp_path / "FLAIR.nii.gz", nifti(np.zeros_like(smooth()))),
    ]
    with pytest.raises(VolumeError, match=f"{paths[1]}: the volume is empty"):
        checked(paths)


def test_warnings_of_reading_are_kept(tmp_path: Path) -> None:
    """Warnings of loading come first, then those of the checks."""
    image = nifti(with_values(2, np.nan), codes=(1, 1))
    image.header.set_qform(oblique((0.9, 1.3, 2.2)), code=1)
    lines = warnings_of(checked(save(tmp_path / "scan.nii.gz", image)).meta)
    assert [line.split()[0] for line in lines] == ["sform", "2"]


@pytest.mark.parametrize(
    "array",
    [
        smooth(),
        np.rint(smooth()),
        np.rint(smooth() / 4),
        np.where(smooth() > 90, np.rint(smooth()), 0),
    ],
)
def test_images_are_not_taken_for_labels(array: Array) -> None:
    """Whole numbers alone, or a background of zeros, do not make a label map."""
    assert not looks_like_labels(array)


def test_real_images_and_labels_are_distinguished(data: Path) -> None:
    """Every real scan is an image; every real segmentation is not."""
    images = [*(data / "real").glob("*T1w*"), *(data / "real").glob("*FLAIR*")]
    images += sorted((data / "hippocampus" / "imagesTr").glob("h*"))[:30]
    labels = [
        *(data / "real").glob("*manual*"),
        *(data / "real").glob("*brainmask*"),
        *(data / "real").glob("*aseg*"),
    ]
    labels += (
        sorted((data / "head_label_maps").glob("*.nii.gz"))[:1]
        + sorted((data / "hippocampus" / "labelsTr").glob("h*"))[:30]
    )
    assert len(images) > 30
    assert len(labels) > 30
    read = [np.asarray(nib.load(path).dataobj) for path in images + labels]
    taken = [
        path.name
        for path, array in zip(images + labels, read, strict=True)
        if looks_like_labels(array)
    ]
    assert taken == [path.name for path in labels]


def _zero_spacing(path: Path) -> None:
    """Write a file with only a qform and a pixdim of 0, which nibabel silently takes for 1."""
    header = nifti().header
    header.set_sform(None, code=0)
    header.set_qform(oblique(), code=1)
    content = bytearray(nib.Nifti1Image(smooth(), None, header).to_bytes())
    content[84:88] = bytes(4)
    path.write_bytes(bytes(content))


def _array(array: Array, affine: Affine | None = None) -> Callable[[Path], None]:
    return lambda path: nib.save(
        nib.Nifti1Image(array, oblique() if affine is None else affine), path
    )


def _colours(path: Path) -> None:
    _array(np.zeros((5, 6, 7), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")]))(path)


def _damaged(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        save(path)
        path.write_bytes(change(path.read_bytes()))

    return write


BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "nan": (_array(np.full((5, 6, 7), np.nan, dtype=np.float32)), "are NaN or infinite"),
    "empty": (_array(np.zeros((5, 6, 7), dtype=np.int16)), "is empty"),
    "constant": (_array(np.ones((5, 6, 7), dtype=np.int16)), "is constant"),
    "zero_spacing": (_zero_spacing, "expected above 0"),
    "absurd_spacing": (
        _array(smooth(), oblique((0.0009, 0.0013, 0.0021))),
        "is the header in metres",
    ),
    "sheared": (_array(smooth(), sheared(75)), "the affine is sheared"),
    "singular": (_array(smooth(), flat()), "the affine is singular"),
    "colours": (_colours, "holds colours"),
    "complex": (_array(smooth().astype(np.complex64)), "holds complex numbers"),
    "series": (_array(np.stack([smooth()] * 3, axis=-1)), "pick one with --volume T"),
    "truncated": (_damaged(lambda content: content[:1000]), "it is truncated"),
    "wrong_crc": (
        _damaged(lambda content: content[:-8] + bytes(4) + content[-4:]),
        "its checksum is wrong",
    ),
    "labels": (_array((smooth() > 100).astype(np.uint8)), "looks like a label map"),
    "nothing": (_damaged(lambda content: b""), "the file is empty"),
}


def test_each_bad_input_has_its_message_and_the_good_ones_are_written(
    tmp_path: Path, tiny_bundle_3d: Path
) -> None:
    """Bad inputs between two good ones: exit status 1, a reason per bad case, two label maps."""
    folder, out = tmp_path / "in", tmp_path / "out"
    save(folder / "a_good.nii.gz")
    save(folder / "z_good.nii.gz")
    for name, (write, _) in BAD.items():
        write(folder / f"{name}.nii.gz")
    result = CliRunner().invoke(
        main, ["segment", str(folder), "-o", str(out), "-b", str(tiny_bundle_3d), "--device", "cpu"]
    )
    assert result.exit_code == 1, result.output
    rows = {row["case"]: row for row in read_csv(out / "cases.csv")}
    assert set(rows) == {*BAD, "a_good", "z_good"}
    for name, (_, says) in BAD.items():
        assert rows[name]["status"] == "failed"
        assert str(folder / name) in rows[name]["message"]
        assert says in rows[name]["message"]
    assert sorted(path.name for path in out.glob("*.nii.gz")) == [
        "a_good_seg.nii.gz",
        "z_good_seg.nii.gz",
    ]
    assert len({row["message"] for row in rows.values()}) == len(BAD) + 1
