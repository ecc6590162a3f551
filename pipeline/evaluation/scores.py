"""Scores of the cases of a dataset: rows, their summary and the comparison of two results."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isnan, nan
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from scipy.stats import wilcoxon

from pipeline.errors import ConfigError, GeometryError, ReadError
from pipeline.evaluation.metrics import METRICS, TOLERANCE_MM, LabelScore, score_masks
from pipeline.io import SAME_GRID_MM, Image, corner_distance, read, read_csv, write_csv
from pipeline.types import Array, Case

MEAN_LABEL = "mean"  # name of the row of a summary that averages over the labels
INTERVAL_PERCENTILES = (2.5, 97.5)  # of a 95 % interval
BOOTSTRAP_RESAMPLES = 10_000
BACKGROUND = 0  # output value that is not a structure and is not scored


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreRow:
    """The score of one label in one case: a row of scores.csv.

    Attributes:
        case: name of the case.
        label: name of the label.
        score: metrics of the label.
    """

    case: str
    label: str
    score: LabelScore

    def columns(self) -> dict[str, Any]:
        """Return the row as written to scores.csv: `case`, `label` and one column per metric."""
        return {"case": self.case, "label": self.label, **asdict(self.score)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Mean:
    """Mean of a metric over cases, with its 95 % bootstrap interval; nan if no case is scored.

    Attributes:
        mean: mean over the scored cases.
        low: lower end of the interval.
        high: upper end of the interval.
    """

    mean: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True, slots=True)
class SummaryRow:
    """The means of one label over all cases: a row of summary.json.

    Attributes:
        label: name of the label, or "mean" for the mean over all labels.
        cases: number of cases in which the label is scored (its Dice is not nan).
        metrics: metric of `LabelScore` → its mean over the cases.
    """

    label: str
    cases: int
    metrics: Mapping[str, Mean]

    def columns(self) -> dict[str, Any]:
        """Return the row as written to summary.json.

        Keys are `label`, `cases` and, for each metric, `<metric>` (the mean), `<metric>_low` and
        `<metric>_high`.
        """
        columns: dict[str, Any] = {"label": self.label, "cases": self.cases}
        for metric, value in self.metrics.items():
            columns[metric] = value.mean
            columns[f"{metric}_low"] = value.low
            columns[f"{metric}_high"] = value.high
        return columns


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Comparison of two results by one metric of one label, over the cases that both score.

    Attributes:
        label: name of the label.
        cases: number of compared cases.
        ours: mean of the metric in the first result.
        theirs: mean of the metric in the second result.
        difference: mean of the paired differences, first result minus second.
        p_value: p-value of the paired, two-sided Wilcoxon signed-rank test; nan for fewer than 2
            cases, 1 if both results are equal in every case.
    """

    label: str
    cases: int
    ours: float
    theirs: float
    difference: float
    p_value: float


def score_case(
    case: Case, prediction: Path, names: Mapping[str, int], *, tolerance_mm: float = TOLERANCE_MM
) -> list[ScoreRow]:
    """Return one row per label of one case, scored on the grid of its reference label map.

    Args:
        case: labelled case, with `case` (its name) and `label` (path of the reference label map).
        prediction: path of the predicted label map. If the file does not exist, because the case
            failed, it is scored as an empty prediction.
        names: name of the label → its value in both label maps; the background, 0, is not scored.
        tolerance_mm: tolerance of the surface Dice (`nsd`), mm.

    Raises:
        GeometryError: prediction and reference are on different grids.
    """
    reference = read(case["label"])
    true = np.rint(reference.array)
    if prediction.is_file():
        predicted = _values_on_grid(read(prediction), reference, case["case"])
    else:
        predicted = np.zeros_like(true)
    spacing = np.linalg.norm(reference.affine[:3, :3], axis=0)
    rows = []
    for label, value in names.items():
        if value == BACKGROUND:
            continue
        score = score_masks(predicted == value, true == value, spacing, tolerance_mm=tolerance_mm)
        rows.append(ScoreRow(case=case["case"], label=label, score=score))
    return rows


def _values_on_grid(prediction: Image, reference: Image, case: str) -> Array:
    """Return the label values of a prediction.

    Raises:
        GeometryError: it is not on the grid of the reference.
    """
    # `score_masks` raises the error for label maps of different shapes
    if prediction.array.shape == reference.array.shape:
        distance = corner_distance(prediction.affine, reference.affine, reference.array.shape)
        if distance > SAME_GRID_MM:
            raise GeometryError(
                f"{case}: prediction and label lie up to {distance:.2f} mm apart; "
                "do image and label share a grid?"
            )
    return np.rint(prediction.array)


def write_scores(path: Path, rows: Iterable[ScoreRow]) -> None:
    """Write scores.csv: one row per case and label, with the columns of `ScoreRow.columns`."""
    write_csv(path, [row.columns() for row in rows])


def read_scores(path: Path) -> list[ScoreRow]:
    """Return the rows of a scores.csv that `volseg evaluate` or `volseg crossval` has written.

    Unknown columns are ignored. A metric whose column is missing is nan, that is, not scored.

    Raises:
        ReadError: the file or one of the columns `case` and `label` does not exist, or the value of
            a metric is not a number.
    """
    if not path.is_file():
        raise ReadError(f"{path}: no such file; expected the scores that `volseg evaluate` writes")
    return [_score_row(path, number, row) for number, row in enumerate(read_csv(path), start=2)]


def _score_row(path: Path, line: int, row: Mapping[str, str]) -> ScoreRow:
    """Return the row in one line of a scores.csv."""
    missing = [name for name in ("case", "label") if name not in row]
    if missing:
        raise ReadError(
            f"{path}: expected the columns case and label, found {', '.join(map(str, row))}"
        )
    values = {}
    for metric in METRICS:
        text = row.get(metric, "nan")
        try:
            values[metric] = float(text)
        except (TypeError, ValueError) as error:  # csv gives None for the cells of a short line
            raise ReadError(
                f"{path}, line {line}, {metric}: expected a number, found {text!r}"
            ) from error
    return ScoreRow(case=row["case"], label=row["label"], score=LabelScore(**values))


def worst_cases(rows: Iterable[ScoreRow], count: int) -> list[str]:
    """Return the names of the cases with the lowest mean Dice over their labels, lowest first.

    Args:
        rows: scores of all cases; cases without any scored label are left out.
        count: largest number of cases to return.
    """
    dice_of_case: dict[str, list[float]] = {}
    for row in rows:
        if not isnan(row.score.dice):
            dice_of_case.setdefault(row.case, []).append(row.score.dice)
    return sorted(dice_of_case, key=lambda case: fmean(dice_of_case[case]))[:count]


def summarise_scores(rows: Iterable[ScoreRow], seed: int = 0) -> list[SummaryRow]:
    """Return the mean of each metric over cases: one row per label, and one for all labels.

    The last row is for the mean over labels: it averages over the labels of each case first, then
    over cases. With a single label it is left out. Values that are nan are skipped. The 95 %
    intervals are bootstrap percentiles: the cases are resampled with replacement.

    Args:
        rows: scores of all cases, with the same labels for each case.
        seed: seed of the resampling.
    """
    by_label: dict[str, list[LabelScore]] = {}
    for row in rows:
        by_label.setdefault(row.label, []).append(row.score)
    tables = {label: _values_of_metrics(scores) for label, scores in by_label.items()}
    if len(tables) > 1:
        tables[MEAN_LABEL] = _mean_over_labels(list(tables.values()))
    # Each row gets a generator of its own, so that a label's interval depends on no other label
    return [
        _summary_row(label, table, np.random.default_rng(seed)) for label, table in tables.items()
    ]


def _values_of_metrics(scores: Sequence[LabelScore]) -> dict[str, Array]:
    """Return metric → its values in all cases, (cases,)."""
    values: dict[str, Array] = {}
    for metric in METRICS:
        values[metric] = np.array([getattr(score, metric) for score in scores], dtype=float)
    return values


def _mean_over_labels(tables: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    """Return metric → mean over the labels in each case, (cases,).

    Args:
        tables: one per label: metric → values, with the cases in the same order.
    """
    means: dict[str, Array] = {}
    for metric in METRICS:
        means[metric] = _nanmean(np.stack([table[metric] for table in tables]))
    return means


def _summary_row(label: str, table: Mapping[str, Array], random: np.random.Generator) -> SummaryRow:
    metrics = {metric: _bootstrap_mean(values, random) for metric, values in table.items()}
    return SummaryRow(label=label, cases=int(np.isfinite(table["dice"]).sum()), metrics=metrics)


def _bootstrap_mean(values: Array, random: np.random.Generator) -> Mean:
    """Return the mean of the values that are not nan, with its 95 % interval."""
    scored = values[~np.isnan(values)]
    if not len(scored):
        return Mean(mean=nan, low=nan, high=nan)
    chosen = random.integers(len(scored), size=(BOOTSTRAP_RESAMPLES, len(scored)))
    means = scored[chosen].mean(axis=1)
    # inverted_cdf returns one of the means; interpolation between a finite one and inf (a missed
    # label) would give nan
    low, high = (
        float(np.percentile(means, percentile, method="inverted_cdf"))
        for percentile in INTERVAL_PERCENTILES
    )
    return Mean(mean=float(scored.mean()), low=low, high=high)


def _nanmean(values: Array) -> Array:
    """Return the mean over the first axis, skipping nan; nan where all values are nan."""
    # np.nanmean does the same, but warns where all values are nan
    scored = ~np.isnan(values)
    total = np.where(scored, values, 0).sum(axis=0)
    count = scored.sum(axis=0)
    mean: Array = np.divide(total, count, out=np.full(total.shape, nan), where=count > 0)
    return mean


def compare_scores(
    ours: Iterable[ScoreRow], theirs: Iterable[ScoreRow], metric: str = "dice"
) -> list[Comparison]:
    """Return one comparison per label: the means of a metric in two results, and a paired test.

    A case counts if both results have it with a finite value of the metric.

    Args:
        ours: score rows of the first result.
        theirs: score rows of the second result.
        metric: name of a metric of `LabelScore`.

    Raises:
        ConfigError: there is no such metric, or no case and label with a finite value in both
            results.
    """
    if metric not in METRICS:
        raise ConfigError(f"metric {metric}: no such metric; expected one of {', '.join(METRICS)}")
    our_values, their_values = _finite_values(ours, metric), _finite_values(theirs, metric)
    pairs: dict[str, list[tuple[float, float]]] = {}
    for (case, label), value in our_values.items():
        if (case, label) in their_values:
            pairs.setdefault(label, []).append((value, their_values[case, label]))
    if not pairs:
        raise ConfigError(
            f"the two results have no case and label in common with a finite {metric}: "
            "compare results of the same cases"
        )
    return [_comparison(label, np.array(values)) for label, values in pairs.items()]


def _finite_values(rows: Iterable[ScoreRow], metric: str) -> dict[tuple[str, str], float]:
    """Return (case, label) → value of the metric, without values that are nan or inf."""
    values = {}
    for row in rows:
        value = getattr(row.score, metric)
        if np.isfinite(value):
            values[row.case, row.label] = value
    return values


def _comparison(label: str, pairs: Array) -> Comparison:
    """Return the comparison of one label.

    Args:
        label: name of the label.
        pairs: (cases, 2) values of the first and the second result.
    """
    ours, theirs = pairs[:, 0], pairs[:, 1]
    if len(pairs) < 2:
        p_value = nan
    elif np.array_equal(ours, theirs):
        p_value = 1.0  # scipy's test is undefined where all differences are 0
    else:
        p_value = float(wilcoxon(ours, theirs).pvalue)
    return Comparison(
        label=label,
        cases=len(pairs),
        ours=float(ours.mean()),
        theirs=float(theirs.mean()),
        difference=float((ours - theirs).mean()),
        p_value=p_value,
    )
