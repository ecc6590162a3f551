"""From a folder in each layout to label maps: plan, train, evaluate, segment, by the commands."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from dataset_folders import LAYOUTS, MORE_LAYOUTS, image, write_nrrd
from phantom import nifti, save, smooth

from pipeline.bundle import check_bundle
from pipeline.cli.app import main
from pipeline.config import BundlePaths, load_spec
from pipeline.io import find_pairs, read_csv

MAKERS = {name: made[0] for name, made in LAYOUTS.items()} | MORE_LAYOUTS
# a network of a few hundred weights, trained for one step
TINY = ("epochs=1", "minutes=null", "repeats=1", "batch_size=1", "patches_per_case=1")
CHECKED = ("4D", "regions")  # which differ in network and input; a check takes seconds
BY_FOLDER = ("decathlon", "nnunet", "4D", "nnunet 1", "regions")  # imagesTr is segmented as it is


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result


def shrink(spec: Path) -> None:
    """Give the network of a spec few channels; nothing else changes."""
    content = yaml.safe_load(spec.read_text())
    content["network"]["features"] = [2] * len(content["network"]["features"])
    spec.write_text(yaml.safe_dump(content, sort_keys=False))


def to_segment(name: str, places: list[Path], folder: Path) -> Path:
    """Return what `volseg segment` gets: a folder of images, a table, or a list of the files."""
    if name in BY_FOLDER:
        return places[0] / "imagesTr"
    if name == "table":
        return places[0]
    layout = find_pairs(places)
    channels = layout.channels or ("image",)
    path = folder / "list.csv"
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["case", *channels])
        for case in layout.cases:
            sources = case["image"] if isinstance(case["image"], list) else [case["image"]]
            writer.writerow([case["case"], *sources])
    return path


# two layouts in every run of the tests, the others where there is time
PARAMS = [
    name if name in CHECKED else pytest.param(name, marks=pytest.mark.stress) for name in MAKERS
]


@pytest.fixture(scope="module", params=PARAMS)
def planned(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, list[Path], Path, Result]:
    """A layout's name, its places, the planned run, and what `volseg plan` printed."""
    threads = torch.get_num_threads()
    folder = tmp_path_factory.mktemp("layout")
    places = MAKERS[request.param](folder / "data")
    config = folder / "mine.yaml"
    result = run("plan", *places, "-o", config, "--minutes", 0.2, "--preset", "fast")
    torch.set_num_threads(threads)
    return request.param, places, config, result


@pytest.mark.slow
def test_from_a_folder_to_label_maps(
    planned: tuple[str, list[Path], Path, Result], tmp_path: Path
) -> None:
    """The bundle passes its checks, held-out cases are scored, maps have the spec's values."""
    name, places, config, result = planned
    paths = BundlePaths(config.with_suffix(""))
    assert "spec.spacing: [0.9, 1.3, 2.1]  (that of all cases" in result.stdout
    again = CliRunner().invoke(main, ["plan", *map(str, places), "-o", str(config)])
    assert again.exit_code == 2  # what is there is not lost
    shrink(paths.spec)
    threads = torch.get_num_threads()
    run("train", config, *TINY, "validate_every=1")
    torch.set_num_threads(threads)
    if name in CHECKED:
        assert check_bundle(paths.folder).errors == {}
    assert "## Worst cases" in paths.training_report.read_text()
    assert paths.readme.is_file()

    out = tmp_path / "scores"
    fold = yaml.safe_load(config.read_text())["splits"]
    run("evaluate", paths.folder, *places, "-o", out, "--splits", fold, "--fold", 1)
    spec = load_spec(paths.spec)
    (held_out,) = json.loads(paths.splits.read_text())[1]["val"]
    rows = read_csv(out / "scores.csv")
    assert [(row["case"], row["label"]) for row in rows] == [
        (held_out, label) for label in spec.values_of
    ]

    maps = tmp_path / "maps"
    run("segment", to_segment(name, places, tmp_path), "-o", maps, "--bundle", paths.folder)
    written = sorted(maps.rglob("*_seg.nii.gz"))
    assert len(written) == 3
    for path in written:
        values = np.unique(np.asarray(nib.load(path).dataobj))
        assert set(values.tolist()) <= set(spec.labels.values())


@pytest.mark.slow
def test_what_each_layout_says_of_its_labels(
    planned: tuple[str, list[Path], Path, Result],
) -> None:
    """Regions and the ignore label are in the spec; folds that are given are the splits."""
    name, _, config, _ = planned
    paths = BundlePaths(config.with_suffix(""))
    content: dict[str, Any] = yaml.safe_load(paths.spec.read_text())
    assert list(content["labels"].values()) == [0, 1, 2]
    assert content.get("ignore_label") == (3 if name == "regions" else None)
    regions = {"whole": [1, 2], "core": [2]} if name == "regions" else {}
    assert content.get("regions", {}) == regions
    splits = json.loads(paths.splits.read_text())
    if name == "table":
        assert [fold["val"] for fold in splits] == [["p0"], ["p1"], ["p2"]]
    assert len(splits) == 3


@pytest.mark.slow
def test_other_orientations_than_ras_are_planned(tmp_path: Path) -> None:
    """A scan whose first axes point left and posterior, as SimpleITK's default grid does."""
    for i in range(2):
        flipped = image(i).affine.copy()
        flipped[:, :2] *= -1
        scan = nib.Nifti1Image(smooth(seed=i), flipped)
        labels = nib.Nifti1Image((smooth(seed=i) > 110).astype(np.uint8), flipped)
        write_nrrd(tmp_path / "images" / f"c{i}.nrrd", scan)
        write_nrrd(tmp_path / "labels" / f"c{i}.nrrd", labels)
    result = run("plan", tmp_path, "-o", tmp_path / "m.yaml", "--minutes", 0.2)
    assert "2 cases" in result.stdout


@pytest.mark.slow
def test_controls_without_foreground_are_trained_on(tmp_path: Path) -> None:
    """They are in the folds, and a step on their patches learns background."""
    for i in range(4):
        array = smooth(seed=i)
        values = np.where(array > 120, 1, 0).astype(np.uint8) * (i > 1)
        save(tmp_path / "images" / f"c{i}.nii.gz", nifti(array))
        save(tmp_path / "labels" / f"c{i}.nii.gz", nib.Nifti1Image(values, image().affine))
    config = tmp_path / "m.yaml"
    result = run("plan", tmp_path, "-o", config, "--minutes", 0.2)
    assert "4 cases" in result.stdout
    paths = BundlePaths(tmp_path / "m")
    assert {name for fold in json.loads(paths.splits.read_text()) for name in fold["val"]} == {
        "c0", "c1", "c2", "c3",
    }  # fmt: skip
    shrink(paths.spec)
    run("train", config, *TINY, "validate_every=1", "splits=null")
    assert paths.weights.is_file()
