"""The report of a training run, and the README that training writes."""

from __future__ import annotations

from math import nan
from pathlib import Path
from typing import Any

import pytest
from phantom import CARD, make_bundle, parse_spec

from pipeline.config import BundlePaths, Card, parse_config
from pipeline.evaluation import read_scores
from pipeline.io import write_csv, write_json
from pipeline.report import trained_page, write_training_report

HISTORY = [
    {
        "epoch": number,
        "loss": 1 / number,
        "learning_rate": 0.01,
        "seconds": 30.0,
        "validation_seconds": 90.0 if number == 30 else 0.0,
        **({"dice": 0.75, "dice front": 0.8, "dice back": 0.7} if number == 30 else {}),
    }
    for number in range(1, 31)
]
# the second label is in two of the three cases
SCORES = {"a": (0.9, 0.8), "b|1": (0.5, nan), "c": (0.7, 0.0)}


def write_records(root: Path, **files: Any) -> BundlePaths:
    """Write the files of a training run into a bundle, with some of them changed or left out."""
    paths = BundlePaths(root)
    paths.readme.unlink(missing_ok=True)  # nobody has written one
    rows = []
    for case, values in SCORES.items():
        for label, dice in zip(("front", "back"), values, strict=True):
            rows.append({"case": case, "label": label, "dice": dice})
    write_csv(paths.training / "history.csv", files.get("history", HISTORY))
    write_csv(paths.validation_scores, rows)
    choices = [
        {"name": "run.epochs", "value": 50, "reason": "20 steps\nof 1 s | measured here"},
        {"name": "spec.overlap", "value": 0.5, "reason": "the usual"},
    ]
    plan = {"dataset": "BIDS derivatives", "cases": 9, "left_out": {"d": "d.nii: empty"}}
    write_json(paths.plan, plan | {"choices": choices})
    return paths


@pytest.fixture
def report(tmp_path: Path) -> list[str]:
    """Lines of a report."""
    root = make_bundle(tmp_path / "mine", run={"epochs": 30, "minutes": 20.0}, overlap=0.5)
    write_training_report(write_records(root).folder)
    return (root / "train" / "report.md").read_text().splitlines()


def test_the_report_has_times_scores_and_worst_cases(report: list[str]) -> None:
    """Validation apart from training; the label with the lowest mean and the worst case first."""
    assert report[0] == "# Training of mine"
    assert "- Epochs: 30, in 15.0 minutes of training and 1.5 minutes of validation." in report
    assert "- Time limit: 20.0 minutes." in report
    start = report.index("| label | cases | mean | median | lowest | Dice 0 |")
    assert report[start + 2 : start + 5] == [
        "| back | 2 | 0.4000 | 0.4000 | 0.0000 | 1 |",
        "| front | 3 | 0.7000 | 0.7000 | 0.5000 | 0 |",
        "| mean of labels | 3 | 0.5667 | 0.5000 | 0.3500 |  |",
    ]
    start = report.index("| case | mean Dice | lowest label |")
    assert report[start + 2 : start + 4] == [
        "| c | 0.3500 | back, 0.0000 |",
        r"| b\|1 | 0.5000 | front, 0.5000 |",
    ]


def test_the_report_has_course_and_plan(report: list[str]) -> None:
    """At most a dozen epochs, the last one among them; changed settings show both values."""
    start = report.index("| epoch | loss | Dice | learning rate | training, s | validation, s |")
    course = report[start + 2 : report.index("All epochs are in `history.csv`.") - 1]
    assert [line.split(" | ")[0] for line in course] == [f"| {n}" for n in range(3, 31, 3)]
    assert course[-1] == "| 30 | 0.0333 | 0.7500 | 0.01 | 30.0 | 90.0 |"
    assert "![Loss, Dice, seconds and learning rate per epoch](progress.png)" in report
    assert "- d: d.nii: empty" in report
    assert r"| `run.epochs` | 30 (planned: 50) | 20 steps of 1 s \| measured here |" in report
    assert "| `spec.overlap` | 0.5 | the usual |" in report


def test_a_run_without_validation_and_without_a_plan(tmp_path: Path) -> None:
    """Scores of an earlier run, which are still in the folder, are not taken for its own."""
    root = make_bundle(tmp_path / "mine")
    history = [{k: v for k, v in row.items() if "dice" not in k} for row in HISTORY[:1]]
    paths = write_records(root, history=history)
    paths.plan.unlink()
    write_training_report(root)
    text = paths.training_report.read_text()
    assert "The run did not score any case" in text
    assert "## Plan" not in text
    assert "Not scored yet" in paths.readme.read_text()


def test_the_plan_of_a_fold_is_that_of_its_bundle(tmp_path: Path) -> None:
    whole = write_records(make_bundle(tmp_path / "mine"))
    fold = make_bundle(tmp_path / "mine" / "folds" / "1")
    write_records(fold).plan.unlink()
    write_training_report(fold)
    assert whole.plan.is_file()
    assert "`spec.overlap`" in BundlePaths(fold).training_report.read_text()


def test_the_readme_of_a_trained_bundle(tmp_path: Path) -> None:
    """Use, channels, labels with their regions, and scores."""
    write_records(tmp_path)
    scores = read_scores(BundlePaths(tmp_path).validation_scores)
    spec = parse_spec(
        output="regions",
        labels={"background": 0, "front": 1, "back": 2},
        regions={"front": [1, 2], "back": [2]},
    )
    page = trained_page(parse_config(Card, CARD, "card"), spec, scores, "mine")
    assert "\nvolseg segment scans/ -o out --bundle mine\n" in page
    assert "| 1 | front | 1, 2 |" in page
    assert "| front | 3 | 0.7000 [" in page
    assert "[train/report.md](../train/report.md)" in page


def test_a_readme_that_somebody_wrote_is_kept(tmp_path: Path) -> None:
    """One that training wrote is replaced."""
    paths = write_records(make_bundle(tmp_path / "mine"))
    write_training_report(paths.folder)
    first = paths.readme.read_text()
    paths.card.write_text(paths.card.read_text().replace("Tiny", "Larger"))
    write_training_report(paths.folder)
    assert paths.readme.read_text() == first.replace("Tiny", "Larger")
    paths.readme.write_text("# My own page\n")
    write_training_report(paths.folder)
    assert paths.readme.read_text() == "# My own page\n"
