"""Rows of scores, their summary and the comparison of two results."""

from __future__ import annotations

from dataclasses import asdict, astuple, replace
from math import inf, isnan, nan
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from phantom import SPACING, oblique, save
from scipy.spatial.distance import dice as dice_dissimilarity
from scipy.stats import bootstrap, wilcoxon

from pipeline.errors import ConfigError, GeometryError, ReadError, VolumeError
from pipeline.evaluation.metrics import METRICS, LabelScore, score_masks
from pipeline.evaluation.scores import (
    ScoreRow,
    compare_scores,
    read_scores,
    score_case,
    summarise_scores,
    worst_cases,
    write_scores,
)
from pipeline.io.tables import read_csv, write_csv
from pipeline.types import Array, Case

NAMES = {"background": 0, "one": 1, "two": 2, "three": 3, "absent": 9}


def row(case: str, label: str, dice: float, **metrics: float) -> ScoreRow:
    """Return a row with this Dice; metrics that are not given are 0.5."""
    values = dict.fromkeys(METRICS, 0.5) | {"dice": dice} | metrics
    return ScoreRow(case=case, label=label, score=LabelScore(**values))


@pytest.fixture
def case(label_maps: tuple[Array, Array], tmp_path: Path) -> Case:
    """A case with a reference label map on an oblique grid."""
    label = save(tmp_path / "label.nii.gz", nib.Nifti1Image(label_maps[0], oblique()))
    return {"case": "x", "label": str(label)}


def test_a_case_is_scored_against_its_label_file(
    case: Case, label_maps: tuple[Array, Array], tmp_path: Path
) -> None:
    """One row per label without the background; a missing prediction is scored as empty."""
    reference, prediction = label_maps
    file = save(tmp_path / "prediction.nii.gz", nib.Nifti1Image(prediction, oblique()))
    rows = score_case(case, file, NAMES)
    assert [(row.case, row.label) for row in rows] == [
        ("x", "one"),
        ("x", "two"),
        ("x", "three"),
        ("x", "absent"),
    ]
    assert rows[0].score.dice == score_masks(prediction == 1, reference == 1, SPACING).dice
    for none in (tmp_path / "none.nii.gz", None):
        missing = score_case(case, none, NAMES)
        assert [row.score.dice for row in missing[:2]] == [0, 0]


def test_a_reference_with_other_values_is_refused(
    case: Case, label_maps: tuple[Array, Array], tmp_path: Path
) -> None:
    """Values that no label has, fractions and nan are named."""
    file = save(tmp_path / "prediction.nii.gz", nib.Nifti1Image(label_maps[1], oblique()))
    with pytest.raises(VolumeError, match=r"has the values 2, expected only \[0, 1, 3\]"):
        score_case(case, file, {"background": 0, "one": 1, "three": 3})
    for value, says in ((0.5, "got 2 values such as 0.5"), (np.nan, "1 voxels are not a number")):
        array = np.ones((7, 8, 9), dtype=np.float32)
        array[0, 0, 0] = value
        label = save(tmp_path / "bad.nii.gz", nib.Nifti1Image(array, oblique()))
        with pytest.raises(VolumeError, match=says):
            score_case({"case": "x", "label": str(label)}, file, NAMES)


def test_regions_are_all_of_their_values(
    case: Case, label_maps: tuple[Array, Array], tmp_path: Path
) -> None:
    """In both maps; scipy's Dice of the masks."""
    reference, prediction = label_maps
    file = save(tmp_path / "prediction.nii.gz", nib.Nifti1Image(prediction, oblique()))
    rows = score_case(case, file, {"whole": (1, 2, 3), "core": (2, 3)})
    for row, values in zip(rows, ((1, 2, 3), (2, 3)), strict=True):
        masks = [np.isin(array, values).ravel() for array in (prediction, reference)]
        assert row.score.dice == pytest.approx(1 - dice_dissimilarity(*masks))


def test_ignored_voxels_count_in_neither_map(
    case: Case, label_maps: tuple[Array, Array], tmp_path: Path
) -> None:
    """Volumes and overlap are those of the other voxels."""
    reference, prediction = label_maps
    file = save(tmp_path / "prediction.nii.gz", nib.Nifti1Image(prediction, oblique()))
    row = score_case(case, file, {"one": 1, "three": 3}, ignore_label=2)[0]
    counted = reference != 2
    masks = [((array == 1) & counted) for array in (prediction, reference)]
    assert row.score.dice == pytest.approx(1 - dice_dissimilarity(*(m.ravel() for m in masks)))
    assert row.score.volume_ml == pytest.approx(masks[0].sum() * np.prod(SPACING) / 1000)


def test_a_prediction_on_another_grid_is_refused(
    case: Case, label_maps: tuple[Array, Array], tmp_path: Path
) -> None:
    """A shifted grid of the same shape, and a grid of another shape."""
    _, prediction = label_maps
    affine = oblique()
    affine[:3, 3] += 1.0
    shifted = save(tmp_path / "shifted.nii.gz", nib.Nifti1Image(prediction, affine))
    with pytest.raises(GeometryError, match=r"label\.nii\.gz: lies up to 1\.73 mm from its image"):
        score_case(case, shifted, NAMES)
    cropped = save(tmp_path / "cropped.nii.gz", nib.Nifti1Image(prediction[1:], oblique()))
    with pytest.raises(GeometryError, match=r"has shape .* expected the same grid"):
        score_case(case, cropped, NAMES)


def test_real_labels_against_themselves(data: Path) -> None:
    """Dice 1 for both structures of a real label file."""
    path = data / "hippocampus" / "labelsTr" / "hippocampus_001.nii.gz"
    labels = {"background": 0, "anterior": 1, "posterior": 2}
    rows = score_case({"case": "x", "label": str(path)}, path, labels)
    assert [row.score.dice for row in rows] == [1, 1]


def test_scores_are_read_back_as_written(tmp_path: Path) -> None:
    """The same rows, with nan and inf; the columns are case, label and the metrics."""
    rows = [row("a", "x", 1 / 3, hd95_mm=inf), row("b", "y", 0.0, nsd=nan)]
    path = tmp_path / "scores.csv"
    write_scores(path, rows)
    assert list(read_csv(path)[0]) == ["case", "label", *METRICS]
    for written, found in zip(rows, read_scores(path), strict=True):
        assert (found.case, found.label) == (written.case, written.label)
        np.testing.assert_array_equal(astuple(found.score), astuple(written.score))


def test_other_columns_are_ignored_and_missing_metrics_are_not_scored(tmp_path: Path) -> None:
    path = tmp_path / "scores.csv"
    write_csv(path, [{"fold": 2, "case": "a", "label": "x", "dice": 0.5}])
    (found,) = read_scores(path)
    assert (found.case, found.score.dice) == ("a", 0.5)
    assert isnan(found.score.nsd)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file; expected the scores that `volseg evaluate` writes"),
        ("case,dice\na,0.5\n", "expected the columns case and label, found case, dice"),
        ("case,label,dice\na,x,0.5\nb,x,half\n", "line 3, dice: expected a number, found 'half'"),
        ("case,label,dice\na,x\n", "line 2, dice: expected a number, found None"),
    ],
)
def test_a_table_that_holds_no_scores_is_refused(
    content: str | None, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "scores.csv"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ReadError, match=message):
        read_scores(path)


def test_the_worst_cases_come_first() -> None:
    """Ordered by the mean over labels; cases without any scored label are left out."""
    dice_of_case = {
        "a": (0.9, 0.5),
        "b": (0.6, 0.7),
        "c": (0.9, 0.9),
        "d": (nan, nan),
        "e": (nan, 0.1),
    }
    rows = []
    for case, (x, y) in dice_of_case.items():
        rows += [row(case, "x", x), row(case, "y", y)]
    assert worst_cases(rows, 3) == ["e", "b", "a"]
    assert worst_cases(rows, 9)[-1] == "c"


def test_a_summary_has_means_over_the_scored_cases() -> None:
    """One row per label and their mean, which averages the labels of each case first."""
    rows = []
    for case, x, y in [("a", 0.9, 0.5), ("b", 0.6, nan), ("c", 0.3, 0.1)]:
        rows += [row(case, "x", x), row(case, "y", y)]
    by_label = {row.label: row for row in summarise_scores(rows)}
    assert list(by_label) == ["x", "y", "mean"]
    assert by_label["x"].metrics["dice"].mean == pytest.approx(0.6)
    assert by_label["y"].metrics["dice"].mean == pytest.approx(0.3)
    assert by_label["mean"].metrics["dice"].mean == pytest.approx((0.7 + 0.6 + 0.2) / 3)
    assert {label: row.cases for label, row in by_label.items()} == {"x": 3, "y": 2, "mean": 3}
    assert summarise_scores(rows) == summarise_scores(rows)


def test_the_interval_of_a_mean_is_that_of_the_bootstrap() -> None:
    """About the mean ± 1.96 standard errors for many cases; a missed label makes it infinite."""
    random = np.random.default_rng(5)
    values = random.normal(0.8, 0.05, 200)
    mean = summarise_scores([row(str(i), "x", v) for i, v in enumerate(values)])[0].metrics["dice"]
    error = values.std() / np.sqrt(len(values))
    assert mean.low == pytest.approx(values.mean() - 1.96 * error, abs=0.3 * error)
    assert mean.high == pytest.approx(values.mean() + 1.96 * error, abs=0.3 * error)


def test_infinite_distances_are_counted_and_not_averaged() -> None:
    """Mean over the finite values, median over all; inf where no value is finite."""
    distances = [inf, 1.0, 3.0, inf, 2.0]
    rows = [row(str(i), "x", 0.5, hd95_mm=mm) for i, mm in enumerate(distances)]
    rows += [row(str(i), "y", 0.5, hd95_mm=inf) for i in range(5)]
    x, y, mean = (found.metrics["hd95_mm"] for found in summarise_scores(rows))
    assert (x.mean, x.median, x.infinite) == (2.0, 3.0, 2)
    assert 1.0 <= x.low < 2.0 < x.high <= 3.0
    assert (y.mean, y.low, y.high, y.median, y.infinite) == (inf, inf, inf, inf, 5)
    assert (mean.mean, mean.infinite) == (2.0, 7)
    columns = summarise_scores(rows)[0].columns()
    assert (columns["hd95_mm_median"], columns["hd95_mm_infinite"]) == (3.0, 2)


def test_missed_and_invented_labels_are_counted() -> None:
    """Of each label over cases, and of all labels together."""
    rows = [
        row("a", "x", 0.0, reference_ml=2.0, volume_ml=0.0),
        row("b", "x", 0.0, reference_ml=2.0, volume_ml=1.0),  # found, but elsewhere
        row("c", "x", 0.0, reference_ml=0.0, volume_ml=1.0),
        row("d", "x", 0.9, reference_ml=2.0, volume_ml=2.0),
        row("e", "x", nan, reference_ml=0.0, volume_ml=0.0),
        *(row(case, "y", 0.0, reference_ml=1.0, volume_ml=0.0) for case in "abcde"),
    ]
    counts = {found.label: (found.missed, found.invented) for found in summarise_scores(rows)}
    assert counts == {"x": (2, 1), "y": (5, 0), "mean": (7, 1)}


def test_a_label_that_no_case_has_has_no_mean() -> None:
    rows = [row("a", "x", 0.5), row("a", "y", nan, nsd=nan)]
    by_label = {row.label: row for row in summarise_scores(rows)}
    assert isnan(by_label["y"].metrics["dice"].mean)
    assert isnan(by_label["y"].metrics["dice"].low)
    assert by_label["y"].cases == 0
    assert by_label["mean"].metrics["dice"].mean == 0.5


def test_a_row_of_a_summary_is_written_flat() -> None:
    """summary.json has the mean of each metric under its name, then interval and median."""
    (summary,) = summarise_scores([row("a", "x", 0.5)])
    columns = summary.columns()
    assert list(columns)[:4] == ["label", "cases", "missed", "invented"]
    assert list(columns)[4:8] == ["dice", "dice_low", "dice_high", "dice_median"]
    assert len(columns) == 4 + 4 * len(METRICS) + 3  # three metrics can be infinite
    assert (columns["dice"], columns["dice_low"], columns["dice_high"]) == (0.5, 0.5, 0.5)


def test_two_results_are_compared_over_their_common_cases() -> None:
    """Means, mean difference and scipy's p-value of the cases with a finite value in both."""
    ours = [row(str(i), "x", 0.5 + 0.01 * i) for i in range(8)]
    theirs = [row(str(i), "x", 0.45 + 0.012 * i) for i in range(1, 8)] + [row("z", "x", 0.1)]
    theirs[0] = replace(theirs[0], score=LabelScore(**(asdict(theirs[0].score) | {"dice": nan})))
    (found,) = compare_scores(ours, theirs)
    a = np.array([0.5 + 0.01 * i for i in range(2, 8)])
    b = np.array([0.45 + 0.012 * i for i in range(2, 8)])
    assert (found.label, found.cases) == ("x", 6)
    assert found.ours == pytest.approx(a.mean())
    assert found.theirs == pytest.approx(b.mean())
    assert found.difference == pytest.approx((a - b).mean())
    assert found.p_value == pytest.approx(wilcoxon(a, b).pvalue)
    interval = bootstrap(
        (a - b,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    assert (found.low, found.high) == pytest.approx(interval, abs=2e-4)
    assert found.left_out == 0


def test_infinite_values_are_left_out_of_a_comparison_and_counted() -> None:
    """A label without a finite pair is compared by their number only."""
    ours = [row("a", "x", 0.5, hd95_mm=1.0), row("b", "x", 0.5, hd95_mm=inf)]
    theirs = [row("a", "x", 0.5, hd95_mm=3.0), row("b", "x", 0.5, hd95_mm=2.0)]
    (found,) = compare_scores(ours, theirs, "hd95_mm")
    assert (found.cases, found.left_out, found.difference) == (1, 1, -2.0)
    (none,) = compare_scores(ours[1:], theirs[1:], "hd95_mm")
    assert (none.cases, none.left_out) == (0, 1)
    assert isnan(none.difference)


def test_several_labels_are_compared_by_their_mean_too() -> None:
    """The mean over the labels that both results score in a case."""
    ours = [row("a", "x", 0.5), row("a", "y", 0.7), row("b", "x", 0.4), row("b", "y", nan)]
    theirs = [row("a", "x", 0.4), row("a", "y", 0.2), row("b", "x", 0.3), row("b", "y", 0.9)]
    found = {row.label: row for row in compare_scores(ours, theirs)}
    assert list(found) == ["x", "y", "mean"]
    assert found["mean"].ours == pytest.approx((0.6 + 0.4) / 2)
    assert found["mean"].theirs == pytest.approx((0.3 + 0.3) / 2)


def test_p_values_that_the_test_does_not_define() -> None:
    """1 where all cases are equal, nan for a single case."""
    equal = [row("a", "x", 0.5), row("b", "x", 0.6), row("a", "y", 0.5)]
    found = {row.label: row for row in compare_scores(equal, equal)}
    assert found["x"].p_value == 1.0
    assert isnan(found["y"].p_value)


def test_results_that_cannot_be_compared_are_refused() -> None:
    """An unknown metric, and results of different cases."""
    rows = [row("a", "x", 0.5)]
    with pytest.raises(ConfigError, match="metric nonsense: no such metric; expected one of dice,"):
        compare_scores(rows, rows, "nonsense")
    with pytest.raises(ConfigError, match=r"no case in common with a value of dice \(a, … ag"):
        compare_scores(rows, [row("b", "x", 0.5)])
    with pytest.raises(ConfigError, match="no label in common: x against y"):
        compare_scores(rows, [row("a", "y", 0.5)])
