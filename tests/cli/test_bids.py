"""`volseg bids` from the command to a dataset that the BIDS validator accepts."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from bids_trees import IMAGES, make_dataset, validator_issues
from click.testing import CliRunner, Result
from PIL import Image as Picture
from report_batch import read_payload

from pipeline.cli.app import main

# wider than the volumes of healthy adults of 18 to 95 years are
ADULTS_ML = {
    "intracranial": (950, 2100),
    "brain": (700, 1700),
    "ventricles": (3, 200),
    "left_hippocampus": (1.7, 6),
    "right_hippocampus": (1.7, 6),
    "left_thalamus": (3.5, 11),
    "right_thalamus": (3.5, 11),
    "brain_stem": (11, 34),
}
POST = "sub-01/ses-post/anat/sub-01_ses-post_acq-fast_rec-norm"


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return make_dataset(tmp_path / "data")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def bids(dataset: Path, out: Path, bundle: Path, *arguments: object) -> Result:
    common = ("-b", bundle, "--device", "cpu", "--runtime", "torch", "--jobs", 1)
    return run("bids", dataset, out, "participant", *common, *arguments)


def label_maps(out: Path) -> list[str]:
    return sorted(path.relative_to(out).as_posix() for path in out.rglob("*_dseg.nii.gz"))


def derivative(image: str) -> str:
    return f"{image.removesuffix('_T1w')}_desc-volseg_dseg.nii.gz"


@pytest.mark.slow
@pytest.mark.parametrize("place", ["out", "data/derivatives/volseg"])
def test_derivatives_are_valid(
    dataset: Path, tiny_bundle_3d: Path, tmp_path: Path, place: str
) -> None:
    """Sessions, runs, acquisitions, report, statistics; no issue of the validator."""
    out = tmp_path / place
    done = bids(dataset, out, tiny_bundle_3d, "--report")
    assert done.exit_code == 0, done.output
    assert label_maps(out) == sorted(map(derivative, IMAGES))
    group = run("bids", dataset, out, "group")
    assert group.exit_code == 0
    assert "the column sessions_age holds the session's" in group.output
    with open(out / "group_volumes.tsv", newline="") as file:
        rows = {row["image"]: row for row in csv.DictReader(file, delimiter="\t")}
    ages = [(rows[image]["age"], rows[image]["sessions_age"]) for image in IMAGES]
    assert ages == [("39", "39.1"), ("39", "39.1"), ("39", "40.6"), ("n/a", "n/a")]
    tables = run("tables", out, "--stats", "all", "--icv", "front")
    assert tables.exit_code == 0, tables.output
    assert (out / "report" / "index.html").is_file()
    assert (out / "freesurfer").is_dir()
    assert validator_issues(out) == []
    errors = [issue for issue in validator_issues(dataset) if issue.startswith("error")]
    assert errors == []


@pytest.mark.slow
def test_the_validator_finds_what_is_wrong(
    dataset: Path, tiny_bundle_3d: Path, tmp_path: Path
) -> None:
    """Without .bidsignore the files that BIDS has no names for are errors."""
    out = tmp_path / "out"
    assert bids(dataset, out, tiny_bundle_3d).exit_code == 0
    (out / ".bidsignore").unlink()
    assert any(issue.startswith("error NOT_INCLUDED") for issue in validator_issues(out))


@pytest.mark.slow
def test_label_maps_are_those_of_segment(
    dataset: Path, tiny_bundle_3d: Path, tmp_path: Path
) -> None:
    """The same voxels, and the same rows of volumes."""
    assert bids(dataset, tmp_path / "bids", tiny_bundle_3d).exit_code == 0
    common = ("-b", tiny_bundle_3d, "--device", "cpu", "--runtime", "torch", "--jobs", 1)
    assert run("segment", dataset, "-o", tmp_path / "plain", *common).exit_code == 0
    for image in IMAGES:
        ours = nib.load(tmp_path / "bids" / derivative(image))
        theirs = nib.load(tmp_path / "plain" / f"{image}_seg.nii.gz")
        np.testing.assert_array_equal(ours.get_fdata(), theirs.get_fdata())
        np.testing.assert_array_equal(ours.affine, theirs.affine)


@pytest.mark.slow
def test_it_continues_and_does_again_what_changed(
    dataset: Path, tiny_bundle_3d: Path, tmp_path: Path
) -> None:
    """Records, resume and repair work by the names of BIDS; a second command does nothing."""
    out = tmp_path / "out"
    assert bids(dataset, out, tiny_bundle_3d, "--participant-label", "01").exit_code == 0
    assert len(label_maps(out)) == 3
    again = bids(dataset, out, tiny_bundle_3d)
    assert "4 of 4 cases are in" in again.output
    assert "3 of them from an earlier run" in again.output
    (out / derivative(IMAGES[0])).unlink()
    sidecar = out / f"{POST}_desc-volseg_dseg.json"
    sidecar.unlink()
    repaired = bids(dataset, out, tiny_bundle_3d)
    assert "3 of them from an earlier run" in repaired.output
    assert len(label_maps(out)) == 4
    assert sidecar.is_file()
    with open(out / "cases.csv", newline="") as file:
        reasons = {row["case"]: row["reason"] for row in csv.DictReader(file)}
    assert "is gone" in reasons[IMAGES[0]]


@pytest.mark.slow
def test_a_failed_image_costs_itself_only(
    dataset: Path, tiny_bundle_3d: Path, tmp_path: Path
) -> None:
    """Its label map of an earlier run goes, and the rest stays valid."""
    out = tmp_path / "out"
    assert bids(dataset, out, tiny_bundle_3d).exit_code == 0
    (dataset / f"{IMAGES[3]}.nii.gz").write_bytes(b"no image")
    failed = bids(dataset, out, tiny_bundle_3d)
    assert failed.exit_code == 1
    assert len(label_maps(out)) == 3
    assert list(out.glob("sub-02/**/*.*")) == []
    group = run("bids", dataset, out, "group")
    assert "a row in participants.tsv, but no image here: sub-07" in group.output
    with open(out / "group_volumes.tsv", newline="") as file:
        rows = {row["image"]: row for row in csv.DictReader(file, delimiter="\t")}
    assert (rows[IMAGES[3]]["status"], rows[IMAGES[3]]["front"]) == ("failed", "n/a")
    assert validator_issues(out) == []


@pytest.mark.slow
def test_shards_make_one_dataset(dataset: Path, tiny_bundle_3d: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for shard in ("1/3", "2/3", "3/3"):
        assert bids(dataset, out, tiny_bundle_3d, "--shard", shard).exit_code == 0
    assert label_maps(out) == sorted(map(derivative, IMAGES))
    assert validator_issues(out) == []


@pytest.mark.slow
def test_another_model_leaves_nothing_of_the_former(
    dataset: Path, tiny_bundle_3d: Path, tmp_path: Path
) -> None:
    from phantom import make_bundle

    out, other = tmp_path / "out", make_bundle(tmp_path / "other", 3, seed=5)
    assert bids(dataset, out, tiny_bundle_3d).exit_code == 0
    refused = bids(dataset, out, other)
    assert refused.exit_code == 2
    assert "holds results of another model" in refused.output
    label = ("--participant-label", "sub-02", "--overwrite")
    assert bids(dataset, out, other, *label).exit_code == 0
    assert label_maps(out) == [derivative(IMAGES[3])]
    assert sorted(path.name for path in out.rglob("*_stats.tsv")) == [
        "sub-02_ses-pre_ce-gd_desc-volseg_stats.tsv"
    ]
    assert validator_issues(out) == []


def shown(dataset: Path, bundle: Path, *arguments: object) -> set[str]:
    """Return the outputs that --dry-run shows."""
    result = bids(dataset, dataset.parent / "out", bundle, "--dry-run", "--json", *arguments)
    assert result.exit_code == 0, result.output
    return {Path(row["output"]).name for row in json.loads(result.stdout)}


@pytest.mark.slow
def test_labels_as_bids_apps_take_them(dataset: Path, tiny_bundle_3d: Path, tmp_path: Path) -> None:
    """Several after one option, with commas, with or without prefix, in the old spelling."""
    everyone = {Path(derivative(image)).name for image in IMAGES}
    second = {Path(derivative(IMAGES[3])).name}
    post = {Path(f"{POST}_desc-volseg_dseg.nii.gz").name}
    assert shown(dataset, tiny_bundle_3d, "--participant-label", "01", "sub-02") == everyone
    assert shown(dataset, tiny_bundle_3d, "--participant_label", "01,02") == everyone
    assert shown(dataset, tiny_bundle_3d, "--participant-label", "02", "-q") == second
    assert shown(dataset, tiny_bundle_3d, "--session-label", "ses-post") == post
    path = tmp_path / "filter.json"
    path.write_text('{"t1w": {"acquisition": "fast"}}')
    assert shown(dataset, tiny_bundle_3d, "--bids-filter-file", path) == post


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["bids", "{data}", "{out}"], "Missing argument 'participant|group'"),
        (["bids", "{data}", "{out}", "subject"], "'subject' is not one of"),
        (["bids", "{out}", "{out}", "participant"], "no such folder; expected a BIDS dataset"),
        (["bids", "{data}", "{data}/x", "participant"], "lies in the dataset itself"),
        (["bids", "{data}", "{out}", "group"], "no output folder of volseg"),
        (
            ["bids", "{data}", "{out}", "participant", "-b", "{bundle}",
             "--participant-label", "01", "9"],
            "no participant 9; there are 01, 02",
        ),
        (
            ["bids", "{data}", "{out}", "participant", "-b", "{bundle}", "--suffix", "T2w"],
            "selected; suffixes there: T1w",
        ),
    ],
)  # fmt: skip
def test_a_wrong_command_is_status_2(
    arguments: list[str], says: str, dataset: Path, tiny_bundle_3d: Path, tmp_path: Path
) -> None:
    places = {"data": dataset, "out": tmp_path / "out", "bundle": tiny_bundle_3d}
    result = run(*(argument.format(**places) for argument in arguments))
    assert result.exit_code == 2
    assert says in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.stress
def test_a_real_dataset_is_segmented_and_valid(data: Path, tmp_path: Path) -> None:
    """24 heads of OpenNeuro by the shipped model: no issue, plausible volumes or a flag, a page."""
    out, dataset = tmp_path / "out", data / "bids_t1w"
    done = run("bids", dataset, out, "participant", "--report")
    assert done.exit_code == 0, done.output
    assert len(label_maps(out)) == 24
    assert run("bids", dataset, out, "group").exit_code == 0
    assert validator_issues(out) == []
    with open(out / "group_volumes.tsv", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert len(rows) == 24
    for row in rows:
        assert 18 <= float(row["age"]) <= 95
        plausible = all(
            low <= float(row[name]) / 1000 <= high for name, (low, high) in ADULTS_ML.items()
        )
        assert plausible or row["warnings"] != "n/a"
    cases = read_payload(out / "report" / "data" / "batch.js")["cases"]
    assert len(cases) == 24
    for case in cases:
        assert case["picture_problem"] == ""
        assert bool(case["volume"]) == case["flagged"]
        for ending in ("", "_outlines"):
            with Picture.open(
                out / "report" / "mosaics" / f"{case['mosaic']}{ending}.webp"
            ) as drawn:
                assert min(drawn.size) > 500
