"""Segmenting and scoring labelled cases: by the command, from Python, and without files."""

from __future__ import annotations

import json
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
from pipeline.io.dataset import fold_cases
from pipeline.types import Case

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
    assert {path.name for path in output.iterdir()} == {
        "case_0_seg.nii.gz",
        "case_2_seg.nii.gz",
        "cases.csv",
        "volumes.csv",
        "run.json",
        "scores.csv",
        "summary.json",
        "dice.png",
        "worst.png",
    }
    assert repr(read_scores(output / "scores.csv")) == repr(list(evaluation.scores))
    summary = json.loads((output / "summary.json").read_text())
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
    lines = result.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == ["front", "back", "mean"]
    front = evaluation.summary[0].metrics["dice"]
    assert lines[0].startswith(f"front: dice {front.mean:.4f} [{front.low:.4f}, {front.high:.4f}]")
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


def test_compare_prints_one_line_per_label(evaluation: Evaluation, output: Path) -> None:
    """Both means and the p-value; status 2 for an unknown metric or a folder without scores."""
    result = run("compare", output, output)
    assert result.exit_code == 0, result.output
    dice = evaluation.summary[0].metrics["dice"].mean
    assert result.stdout.splitlines()[0] == (
        f"front: dice {dice:.4f} against {dice:.4f} over 3 cases, p = 1"
    )
    unknown = run("compare", output, output, "--metric", "nonsense")
    assert unknown.exit_code == 2
    assert "metric nonsense: no such metric; expected one of dice, hd95_mm" in unknown.stderr
    missing = run("compare", output, output.parent)
    assert missing.exit_code == 2
    assert "scores.csv: no such file" in missing.stderr
