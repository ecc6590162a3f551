"""Segmenting and scoring labelled cases: by the command, from Python, and without files."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from click.testing import CliRunner, Result
from phantom import nifti, oblique, save, smooth

import pipeline
from pipeline.cli.app import main
from pipeline.evaluation.evaluation import Evaluation, evaluate, segment_and_score
from pipeline.evaluation.scores import read_scores
from pipeline.inference import Model
from pipeline.io import read_csv
from pipeline.io.dataset import fold_cases
from pipeline.types import Array, Case

NAMES = ("case_0", "case_1", "case_2")
FAILING = "case_1"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three labelled volumes, of which one cannot be read, and one fold that leaves it out."""
    root = tmp_path_factory.mktemp("dataset")
    pairs = []
    for i, name in enumerate(NAMES):
        array = smooth((12 + i, 14, 13), seed=i)
        label = np.select([array > 130, array > 110], [300, 7], 0).astype(np.int16)
        pair = {"image": f"images/{name}.nii.gz", "label": f"labels/{name}.nii.gz"}
        save(root / pair["image"], nifti(array))
        save(root / pair["label"], nib.Nifti1Image(label, oblique()))
        pairs.append(pair)
    (root / "images" / f"{FAILING}.nii.gz").write_bytes(b"")
    (root / "dataset.json").write_text(json.dumps({"training": pairs}))
    held_out = [name for name in NAMES if name != FAILING]
    (root / "splits.json").write_text(json.dumps([{"train": [FAILING], "val": held_out}]))
    return root


@pytest.fixture(scope="module")
def cases(dataset: Path) -> list[Case]:
    return fold_cases(dataset, None, 0, "val")


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("out") / "all"


@pytest.fixture(scope="module")
def evaluation(model_3d: Model, cases: list[Case], output: Path) -> Evaluation:
    """The evaluation of all cases, written to `output`."""
    return evaluate(model_3d, cases, output, tolerance_mm=2.0)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_an_evaluation_has_scores_summary_and_failed_cases(evaluation: Evaluation) -> None:
    """One row per case and label; the failed case is scored as one without any prediction."""
    rows = [(row.case, row.label) for row in evaluation.scores]
    assert rows == [(case, label) for case in NAMES for label in ("front", "back")]
    assert {row.score.dice for row in evaluation.scores if row.case == FAILING} == {0.0}
    assert [row.label for row in evaluation.summary] == ["front", "back", "mean"]
    assert list(evaluation.failed) == [FAILING]
    assert "the file is empty" in evaluation.failed[FAILING]


def test_an_evaluation_is_written(evaluation: Evaluation, output: Path) -> None:
    """scores.csv, summary.json and two pictures, next to what `segment_cases` writes."""
    assert {path.name for path in output.iterdir()} >= {
        "case_0_seg.nii.gz",
        "case_2_seg.nii.gz",
        "cases.csv",
        "volumes.csv",
        "run.json",
        "scores.csv",
        "summary.json",
        "summary.csv",
        "dice.png",
        "worst.png",
    }
    assert repr(read_scores(output / "scores.csv")) == repr(list(evaluation.scores))
    summary = json.loads((output / "summary.json").read_text())
    assert list(summary["failed"]) == [FAILING]
    assert [row["label"] for row in read_csv(output / "summary.csv")] == ["front", "back", "mean"]
    assert summary["tolerance_mm"] == evaluation.tolerance_mm == 2.0
    assert repr(summary["labels"]) == repr([row.columns() for row in evaluation.summary])


def test_scoring_alone_writes_no_tables_of_scores(
    model_3d: Model, cases: list[Case], evaluation: Evaluation, tmp_path: Path
) -> None:
    """The same scores as `evaluate`, the files of `segment_cases` only, and progress per case."""
    seen: list[str] = []
    scored = segment_and_score(
        model_3d,
        cases,
        tmp_path / "out",
        tolerance_mm=2.0,
        progress=lambda row: seen.append(row.case),
    )
    assert seen == list(NAMES)
    assert repr(scored.scores) == repr(evaluation.scores)
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert not written & {"scores.csv", "summary.json", "dice.png", "worst.png"}


@pytest.mark.slow
def test_the_command_gives_the_same_scores(
    evaluation: Evaluation, output: Path, tiny_bundle_3d: Path, dataset: Path, tmp_path: Path
) -> None:
    """The same file, the summary on stdout, and exit status 1 because a case failed."""
    common = ("evaluate", tiny_bundle_3d, dataset, "--device", "cpu", "--tolerance", 2)
    result = run(*common, "-o", tmp_path / "out")
    assert result.exit_code == 1, result.output
    written = (tmp_path / "out" / "scores.csv").read_bytes()
    assert written == (output / "scores.csv").read_bytes()
    lines = [line.split() for line in result.stdout.splitlines()]
    assert [line[0] for line in lines[:4]] == ["label", "front", "back", "mean"]
    front = evaluation.summary[0].metrics["dice"]
    assert lines[1][1:5] == ["3", f"{front.mean:.4f}", f"[{front.low:.4f},", f"{front.high:.4f}]"]
    assert lines[1][-2:] == [str(evaluation.summary[0].missed), "0"]
    assert f"failed: {FAILING}: " in result.stderr
    as_json = run(*common, "-o", tmp_path / "out", "--json")
    assert repr(json.loads(as_json.stdout)) == repr([row.columns() for row in evaluation.summary])


@pytest.mark.slow
def test_the_api_evaluates_a_fold(
    tiny_bundle_3d: Path, model_3d: Model, dataset: Path, tmp_path: Path
) -> None:
    """A bundle's path and a loaded model give the same scores of the fold's validation cases."""
    by_path = pipeline.evaluate(
        tiny_bundle_3d, dataset, tmp_path / "a", splits="splits.json", fold=0
    )
    by_model = pipeline.evaluate(model_3d, dataset, tmp_path / "b", splits="splits.json", fold=0)
    assert [row.case for row in by_path.scores] == ["case_0", "case_0", "case_2", "case_2"]
    assert by_path.failed == {}
    assert (tmp_path / "a" / "scores.csv").is_file()
    for ours, theirs in zip(by_path.scores, by_model.scores, strict=True):
        assert ours.score.dice == pytest.approx(theirs.score.dice, abs=1e-3)


@pytest.fixture
def two_folders(tmp_path: Path) -> tuple[Path, Path]:
    """Three images and their label maps, as two folders."""
    folders = tmp_path / "images", tmp_path / "drawn"
    for i, name in enumerate(NAMES):
        array = smooth((12 + i, 14, 13), seed=i)
        label = np.select([array > 130, array > 110], [300, 7], 0).astype(np.int16)
        save(folders[0] / f"{name}.nii.gz", nifti(array))
        save(folders[1] / f"{name}_seg.nii.gz", nib.Nifti1Image(label, oblique()))
    return folders


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda values: values[:-1], r"has shape \(12, 14, 13\), its image \(13, 14, 13\)"),
        (lambda values: (values > 0) * 255, r"has the values 255, expected only \[0, 7, 300\]"),
        (lambda values: np.where(values > 0, values, np.nan), "voxels are not a number"),
        (None, "the file is empty"),
    ],
    ids=["shape", "values", "nan", "unreadable"],
)
def test_a_label_map_that_cannot_be_used_is_one_failure(
    change: Callable[[Array], Array] | None,
    says: str,
    two_folders: tuple[Path, Path],
    tiny_bundle_3d: Path,
    tmp_path: Path,
) -> None:
    """The case is named, the others are scored, and the exit status is 1."""
    path = two_folders[1] / f"{FAILING}_seg.nii.gz"
    if change is None:
        path.write_bytes(b"")
    else:
        values = change(np.asarray(nib.load(path).dataobj)).astype(np.float32)
        save(path, nib.Nifti1Image(values, oblique()))
    out = tmp_path / "out"
    result = run("evaluate", tiny_bundle_3d, *two_folders, "-o", out, "--device", "cpu")
    assert result.exit_code == 1, result.output
    assert re.search(rf"^failed: {FAILING}: .*{says}", result.stderr, re.MULTILINE)
    scored = {row["case"] for row in read_csv(out / "scores.csv")}
    assert scored == {"case_0", "case_2"}
    assert FAILING in json.loads((out / "summary.json").read_text())["failed"]


def test_a_failed_case_is_not_scored_by_an_older_prediction(
    model_3d: Model, two_folders: tuple[Path, Path], tmp_path: Path
) -> None:
    """Its image can no longer be read: nothing is found in it, whatever lies in the folder."""
    cases = fold_cases(two_folders, None, 0, "val")
    first = evaluate(model_3d, cases, tmp_path / "out")
    assert first.failed == {}
    (two_folders[0] / f"{FAILING}.nii.gz").write_bytes(b"")
    old = (tmp_path / "out" / "case_0_seg.nii.gz").read_bytes()
    again = evaluate(model_3d, cases, tmp_path / "out", overwrite=True)
    (tmp_path / "out" / f"{FAILING}_seg.nii.gz").write_bytes(old)
    again = evaluate(model_3d, cases, tmp_path / "out")
    assert list(again.failed) == [FAILING]
    assert {row.score.volume_ml for row in again.scores if row.case == FAILING} == {0.0}


def test_without_any_usable_label_map_there_are_no_pictures(
    model_3d: Model, two_folders: tuple[Path, Path], tmp_path: Path
) -> None:
    for path in two_folders[1].iterdir():
        path.write_bytes(b"")
    found = evaluate(model_3d, fold_cases(two_folders, None, 0, "val"), tmp_path / "out")
    assert len(found.failed) == 3
    assert not (tmp_path / "out" / "dice.png").exists()


def test_compare_prints_one_line_per_label(evaluation: Evaluation, output: Path) -> None:
    """Both means and the p-value; status 2 for an unknown metric or a folder without scores."""
    result = run("compare", output, output)
    assert result.exit_code == 0, result.output
    dice = evaluation.summary[0].metrics["dice"].mean
    assert result.stdout.splitlines()[0] == (
        f"front: dice {dice:.4f} against {dice:.4f}, difference +0.0000 [+0.0000, +0.0000] "
        "over 3 cases, p = 1"
    )
    unknown = run("compare", output, output, "--metric", "nonsense")
    assert unknown.exit_code == 2
    assert "metric nonsense: no such metric; expected one of dice, hd95_mm" in unknown.stderr
    missing = run("compare", output, output.parent)
    assert missing.exit_code == 2
    assert "scores.csv: no such file" in missing.stderr
