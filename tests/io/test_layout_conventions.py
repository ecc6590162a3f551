"""What each convention states besides its pairs: channels, regions, ignored voxels, folds."""

from __future__ import annotations

import json
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from dataset_folders import (
    LABELS,
    bids,
    decathlon_4d,
    image,
    label,
    nnunet,
    nnunet_regions,
    nnunet_v1,
    slicer,
    table,
    two_folders,
    write_nrrd,
)
from phantom import parse_spec, save

from pipeline.errors import ConfigError, VolumeError
from pipeline.io import read, read_channels
from pipeline.io.cases import find_cases
from pipeline.io.layout import Layout
from pipeline.io.layouts import find_pairs
from pipeline.transforms.loading import LoadVolumed


def names_of(layout: Layout) -> list[str]:
    return [case["case"] for case in layout.cases]


def change_json(root: Path, **changes: Any) -> None:
    path = root / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def messages(layout: Layout) -> dict[str, str]:
    return {problem.case: problem.message for problem in layout.problems}


def test_the_volumes_of_one_file_are_its_channels(tmp_path: Path) -> None:
    """In the order of the file, with nibabel's voxels; also where the file is to be segmented."""
    layout = find_pairs(decathlon_4d(tmp_path))
    assert layout.channels == ("T1w", "FLAIR")
    path = layout.cases[0]["image"]
    stored = np.asarray(nib.load(path).dataobj)
    for number, found in enumerate(read_channels(path, 2)):
        np.testing.assert_array_equal(found.array, stored[..., number])
    case: dict[Hashable, Any] = dict(layout.cases[0].items())
    loaded = LoadVolumed(("image", "label"), channels=2)(case)
    np.testing.assert_array_equal(loaded["image"].numpy(), np.moveaxis(stored, -1, 0))
    assert loaded["image"].meta["sources"] == [path, path]
    assert loaded["label"].shape == (1, *stored.shape[:3])
    with pytest.raises(VolumeError, match="holds 2 volumes, expected one"):
        LoadVolumed("image", channels=3)(case)
    assert len(read_channels(path, 2, volume=1)) == 1


def test_a_file_of_all_channels_is_a_case_to_segment(tmp_path: Path) -> None:
    """In a folder and in a table; a file of one volume is asked for its channel."""
    decathlon_4d(tmp_path, count=1)
    folder = tmp_path / "imagesTr"
    (found,) = find_cases([folder], parse_spec(channels=["T1w", "FLAIR"]))
    assert found == {"case": "case_0", "image": str(folder / "case_0.nii.gz")}
    (tmp_path / "list.csv").write_text("case,image\na,imagesTr/case_0.nii.gz\n")
    (listed,) = find_cases([tmp_path / "list.csv"], parse_spec(channels=["T1w", "FLAIR"]))
    assert listed == {"case": "a", "image": str(folder / "case_0.nii.gz")}
    save(folder / "flat.nii.gz", image())
    flat = find_cases([folder], parse_spec(channels=["T1w", "FLAIR"]))[1]
    assert "or a file of 2 volumes" in flat["problem"]


def test_nnunet_1_lists_names_without_the_channel(tmp_path: Path) -> None:
    """Each listed name stands for NAME_0000, NAME_0001; a case that lacks one is named."""
    (root,) = nnunet_v1(tmp_path, count=4)
    (root / "imagesTr" / "case_1_0001.nii.gz").unlink()
    (root / "imagesTr" / "case_2_0000.nii.gz").unlink()
    layout = find_pairs([root])
    assert names_of(layout) == ["case_0", "case_3"]
    assert layout.kind == "nnU-Net 1 raw folder"
    assert layout.cases[0]["image"] == [
        str(root / "imagesTr" / f"case_0_{channel:04}.nii.gz") for channel in (0, 1)
    ]
    assert layout.labels == LABELS
    assert layout.channels == ("T1w", "FLAIR")
    assert "has 1 channels, most cases have 2" in messages(layout)["case_1"]
    assert "listed, and missing" in messages(layout)["case_2"]


def test_regions_and_the_ignore_label(tmp_path: Path) -> None:
    """The values of each region, what is written for it in the order asked for, and the rest."""
    (root,) = nnunet_regions(tmp_path)
    layout = find_pairs([root])
    assert layout.labels == {"background": 0, "whole": 1, "core": 2}
    assert layout.regions == {"whole": (1, 2), "core": (2,)}
    assert layout.ignore_label == 3
    assert layout.values == {0, 1, 2, 3}
    assert layout.file_ending == ".nii.gz"


@pytest.mark.parametrize(
    ("labels", "order", "written"),
    [
        ({"whole": [1, 2, 3], "core": [2, 3], "active": 3}, [1, 2, 3], [1, 2, 3]),
        ({"whole": [1, 2, 3], "core": [2, 3], "active": 3}, None, [1, 2, 3]),
        ({"whole": [3, 1], "core": 1}, None, [3, 1]),
        ({"whole": ["1", "2"], "core": ["2"]}, None, [1, 2]),
    ],
)
def test_what_is_written_for_a_region(
    labels: dict[str, Any], order: list[int] | None, written: list[int], tmp_path: Path
) -> None:
    """The value that regions_class_order gives, else the region's own one."""
    (root,) = nnunet(tmp_path, count=1)
    change_json(root, labels={"background": 0, **labels})
    if order is not None:
        change_json(root, regions_class_order=order)
    layout = find_pairs([root])
    assert layout.labels is not None
    assert list(layout.labels.values()) == [0, *written]
    assert set(layout.regions) == set(labels)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"labels": {"background": 0, "a": [1, 2], "b": 2}, "regions_class_order": [1]},
            "regions_class_order: expected 2 values, one for each of a, b",
        ),
        ({"labels": {"background": 0, "a": [2], "b": [1, 2]}}, "values of a are all in later"),
        ({"labels": {"background": 0, "a": "one"}}, "labels.a: expected a whole number"),
        ({"file_ending": ".png"}, r"file_ending is \.png, expected one of \.nii"),
    ],
)
def test_what_dataset_json_cannot_say(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    (root,) = nnunet(tmp_path, count=1)
    change_json(root, **changes)
    with pytest.raises(ConfigError, match=says):
        find_pairs([root])


def test_an_ignore_label_without_regions(tmp_path: Path) -> None:
    (root,) = nnunet(tmp_path, count=1)
    change_json(root, labels={"background": 0, "a": 1, "b": 2, "ignore": 3})
    layout = find_pairs([root])
    assert (layout.labels, layout.ignore_label) == ({"background": 0, "a": 1, "b": 2}, 3)
    assert layout.regions == {}


def test_the_file_ending_chooses_the_files(tmp_path: Path) -> None:
    """Others in the folders, such as a preview, are not taken."""
    (root,) = nnunet(tmp_path, count=1)
    change_json(root, file_ending=".nii.gz")
    save(root / "imagesTr" / "case_0_0000.nii", image(5))
    save(root / "labelsTr" / "other.nii", label(5))
    layout = find_pairs([root])
    assert str(layout.cases[0]["image"][0]).endswith(".nii.gz")
    assert layout.problems == []


def test_files_that_nnunet_lists_by_path(tmp_path: Path) -> None:
    """`dataset` names the files of each case, wherever they are."""
    pairs = two_folders(tmp_path, count=2)
    listed = {
        f"p{i}": {"images": [f"scans/case.{i}.nii.gz"], "label": f"drawn/case.{i}_seg.nii.gz"}
        for i in range(3)
    }
    content = {"channel_names": {"0": "CT"}, "labels": LABELS, "dataset": listed}
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    layout = find_pairs([tmp_path])
    assert names_of(layout) == ["p0", "p1"]
    assert layout.cases[0]["image"] == str(pairs[0] / "case.0.nii.gz")
    assert "listed, and missing" in messages(layout)["p2"]


@pytest.mark.parametrize(
    ("name", "modality"),
    [("CT", "CT"), ("ct", "CT"), ("CTA", "CT"), ("CT_venous", "CT"), ("T1w", "MR"), ("CTX", "MR")],
)
def test_the_modality_of_a_channel(name: str, modality: str) -> None:
    assert Layout(kind="", cases=[], channels=(name, "T2")).modalities == (modality, "MR")


def test_equal_names_of_channels_are_numbered(tmp_path: Path) -> None:
    (root,) = nnunet(tmp_path)
    change_json(root, channel_names={"0": "MRI", "1": "MRI"})
    assert find_pairs([root]).channels == ("MRI 0", "MRI 1")


@pytest.mark.parametrize("ending", [".seg", "-label", "_label", "-seg", "_dseg", "-labelmap"])
def test_names_of_slicer_and_others(ending: str, tmp_path: Path) -> None:
    """In folders of their own and next to the images; voxels and grid are those of SimpleITK."""
    for folder, suffix in (("images", ""), ("labels", ending)):
        for i in range(2):
            made = image(i) if not suffix else label(i)
            write_nrrd(tmp_path / folder / f"c{i}{suffix}.nrrd", made)
    assert names_of(find_pairs([tmp_path])) == ["c0", "c1"]
    for path in (tmp_path / "labels").iterdir():
        path.rename(tmp_path / "images" / path.name)
    layout = find_pairs([tmp_path / "images"])
    assert names_of(layout) == ["c0", "c1"]
    assert layout.problems == []
    np.testing.assert_allclose(read(layout.cases[1]["label"]).affine, label().affine, atol=1e-5)


def test_a_second_label_map_of_a_case_is_named(tmp_path: Path) -> None:
    slicer(tmp_path)
    write_nrrd(tmp_path / "c0-label.nrrd", label())
    layout = find_pairs([tmp_path])
    assert names_of(layout) == ["c0", "c1", "c2"]
    assert "a second label map of this case" in messages(layout)["c0"]


def test_names_that_end_like_a_label(tmp_path: Path) -> None:
    """An image may be called c_mask too: its label of the same name is its own."""
    save(tmp_path / "images" / "c_mask.nii.gz", image())
    save(tmp_path / "labels" / "c_mask.nii.gz", label())
    assert names_of(find_pairs([tmp_path])) == ["c_mask"]


def test_two_folders_of_nnunet(tmp_path: Path) -> None:
    """Channels are joined by their numbers; imagesTr and labelsTr keep their dataset.json."""
    (root,) = nnunet_regions(tmp_path)
    both = [root / "imagesTr", root / "labelsTr"]
    assert find_pairs(both).ignore_label == 3
    others = [path.rename(root / name) for path, name in zip(both, ("x", "y"), strict=True)]
    layout = find_pairs(others)
    assert layout.labels is None
    assert [Path(path).name for path in layout.cases[0]["image"]] == [
        "case_0_0000.nii.gz",
        "case_0_0001.nii.gz",
    ]


def test_bids_takes_the_image_of_the_same_run_and_the_names_of_the_table(tmp_path: Path) -> None:
    (root,) = bids(tmp_path, count=1)
    place = root / "sub-00" / "ses-a" / "anat"
    save(place / "sub-00_ses-a_run-2_T1w.nii.gz", image(4))
    labels = root / "derivatives" / "manual" / "sub-00" / "ses-a" / "anat"
    save(labels / "sub-00_ses-a_run-2_desc-drawn_dseg.nii.gz", label(4))
    (root / "derivatives" / "manual" / "dseg.tsv").write_text("index\tname\n1\tfront\n2\tback\n")
    layout = find_pairs([root])
    images = {case["case"]: [Path(path).name for path in case["image"]] for case in layout.cases}
    assert images == {
        "sub-00_ses-a": [f"sub-00_ses-a_{name}.nii.gz" for name in ("FLAIR", "T1w", "T2w")],
        "sub-00_ses-a_run-2": [
            "sub-00_ses-a_FLAIR.nii.gz",
            "sub-00_ses-a_run-2_T1w.nii.gz",
            "sub-00_ses-a_T2w.nii.gz",
        ],
    }
    assert layout.label_names == {1: "front", 2: "back"}


def test_a_table_gives_channels_folds_and_subjects(tmp_path: Path) -> None:
    """Paths are relative to the table; the columns between are the channels."""
    (path,) = table(tmp_path)
    layout = find_pairs([path])
    assert layout.channels == ("T1w", "FLAIR")
    assert layout.cases[1] == {
        "case": "p1",
        "image": [str(tmp_path / "t1" / "1.nii.gz"), str(tmp_path / "flair" / "1.nii.gz")],
        "label": str(tmp_path / "drawn" / "1.nii.gz"),
    }
    assert layout.folds == {"p0": "0", "p1": "1", "p2": "2"}
    assert layout.subjects == {"p0": "s0", "p1": "s1", "p2": "s2"}


def test_rows_of_a_table_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    """Empty cells, missing files, repeated names; tabs in a .tsv; a case needs no name."""
    table(tmp_path, count=1)
    (tmp_path / "a.tsv").write_text(
        "MRI\tlabel\n"
        "t1/0.nii.gz\tdrawn/0.nii.gz\n"
        "t1/0.nii.gz\tdrawn/0.nii.gz\n"
        "t1/9.nii.gz\tdrawn/9_seg.nii.gz\n"
        "\tdrawn/8.nii.gz\n"
    )
    layout = find_pairs([tmp_path / "a.tsv"])
    assert names_of(layout) == ["0"]
    found = [(problem.case, problem.kind) for problem in layout.problems]
    assert found == [("0", "duplicate"), ("9", "missing_file"), ("8", "no_image")]
    assert "a.tsv, line 3: a second case named 0" in layout.problems[0].message


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("case,T1w\na,b\n", "found the columns case, T1w; expected label"),
        ("case,label\na,b\n", "found the columns case, label; expected label, and one column per"),
        ("T1w,label\n", "lists no case"),
        ("T1w,label\na,b,c\n", "more fields than the header"),
    ],
)
def test_a_table_that_is_none(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(ConfigError, match=says):
        find_pairs([tmp_path / "a.csv"])


def test_folds_of_some_cases_only_are_refused(tmp_path: Path) -> None:
    (path,) = table(tmp_path)
    path.write_text(path.read_text().replace(",1,s1", ",,s1"))
    with pytest.raises(ConfigError, match="p1 has no fold; give all cases one, or none"):
        find_pairs([path])
