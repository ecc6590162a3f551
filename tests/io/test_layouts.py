"""Pairs of image and label in each folder layout of a dataset, and the files without a partner."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from dataset_folders import LABELS, LAYOUTS, decathlon, image, label, nnunet, two_folders
from phantom import save

from pipeline.errors import ConfigError
from pipeline.io.layouts import find_pairs


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_layout_gives_its_pairs(name: str, tmp_path: Path) -> None:
    """Names, the order of channels and the labels are those of the folder; all files exist."""
    make, channels, first = LAYOUTS[name]
    layout = find_pairs(make(tmp_path))
    assert layout.cases[0]["case"] == first
    assert len(layout.cases) == 3
    assert layout.channels == channels
    assert layout.problems == []
    for case in layout.cases:
        sources = case["image"] if isinstance(case["image"], list) else [case["image"]]
        assert len(sources) == len(channels or "1")
        assert all(Path(path).is_file() for path in [*sources, case["label"]])
        for channel, path in zip(channels or (), sources, strict=False):
            assert channel in path or name in ("decathlon", "nnunet")
    assert layout.labels == (LABELS if name in ("decathlon", "nnunet") else None)
    assert layout.licence == ("CC0" if name == "decathlon" else "")


def test_all_files_without_a_partner_are_named(tmp_path: Path) -> None:
    """Images without label, labels without image, missing channels and wrong names."""
    (root,) = nnunet(tmp_path)
    save(root / "imagesTr" / "lone_0000.nii.gz", image())
    save(root / "imagesTr" / "lone_0001.nii.gz", image())
    save(root / "imagesTr" / "noted.nii.gz", image())
    save(root / "labelsTr" / "orphan.nii.gz", label())
    (root / "imagesTr" / "case_2_0001.nii.gz").unlink()
    layout = find_pairs([root])
    assert [case["case"] for case in layout.cases] == ["case_0", "case_1"]
    messages = {problem.case: problem.message for problem in layout.problems}
    assert set(messages) == {"lone", "noted", "orphan", "case_2"} | ({"case_2"} & set(messages))
    assert "has no label" in messages["lone"]
    assert "has no image" in messages["orphan"]
    assert "channel's number" in messages["noted"]
    (root,) = decathlon(tmp_path / "other")
    save(root / "labelsTr" / "extra.nii.gz", label())
    assert [(problem.case, problem.kind) for problem in find_pairs([root]).problems] == [
        ("extra", "not_listed")
    ]
    with pytest.raises(ConfigError, match="expected a Decathlon"):
        find_pairs([tmp_path / "other" / "labelsTr"])


@pytest.mark.parametrize("count", [0, 3])
def test_a_dataset_is_one_folder_or_two(count: int, tmp_path: Path) -> None:
    """Any other number is an error that says what to give."""
    folders = [*two_folders(tmp_path), tmp_path][:count]
    with pytest.raises(ConfigError, match="expected one dataset folder, or a folder of images and"):
        find_pairs(folders)


@pytest.mark.parametrize("content", [[], ["training"], "training", 3])
def test_a_dataset_json_without_a_mapping_describes_no_dataset(
    content: object, tmp_path: Path
) -> None:
    """The folder is read in the layout that it has."""
    images, labels = two_folders(tmp_path)
    images.rename(tmp_path / "images")
    labels.rename(tmp_path / "labels")
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    assert len(find_pairs([tmp_path]).cases) == 3


def test_the_layouts_have_an_order(tmp_path: Path) -> None:
    """A dataset.json that lists its pairs counts more than the names of its folders."""
    decathlon(tmp_path)
    two_folders(tmp_path)
    (tmp_path / "scans").rename(tmp_path / "images")
    (tmp_path / "drawn").rename(tmp_path / "labels")
    assert find_pairs([tmp_path]).kind == "Decathlon dataset.json"
    (tmp_path / "dataset.json").unlink()
    assert find_pairs([tmp_path]).kind == "nnU-Net raw folder"
    (tmp_path / "imagesTr").rename(tmp_path / "derivatives")
    assert find_pairs([tmp_path]).kind == "BIDS derivatives"
    (tmp_path / "derivatives").rename(tmp_path / "other")
    assert find_pairs([tmp_path]).kind == "a folder of images and one of labels"
