"""Scores of the cases of a dataset: rows, their summary and the comparison of two results."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import inf, isnan, nan
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from scipy.stats import wilcoxon

from pipeline.errors import ConfigError, ReadError
from pipeline.evaluation.metrics import METRICS, TOLERANCE_MM, LabelScore, score_masks
from pipeline.io import check_label_grid, read, read_csv, read_label_map, write_csv
from pipeline.types import Array, Case

MEAN_LABEL = "mean"  # name of the row of a summary that averages over the labels
INTERVAL_PERCENTILES = (2.5, 97.5)  # of a 95 % interval
BOOTSTRAP_RESAMPLES = 10_000
BACKGROUND = 0  # output value that is not a structure and is not scored
CAN_BE_INFINITE = ("hd95_mm", "assd_mm", "difference_percent")
NAMED_CASES = 3  # cases that a message names


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
    """Mean and median of a metric over cases; nan if no case is scored.

    Distances are infinite where only one of prediction and reference has the label. A single such
    case would make the mean infinite, so that it is taken over the finite values, and the number of
    the others stands beside it.

    Attributes:
        mean: mean over the finite values; inf if all are infinite.
        low: lower end of its 95 % bootstrap interval.
        high: upper end of the interval.
        median: median over all values, the infinite ones included.
        infinite: number of infinite values.
    """

    mean: float
    low: float
    high: float
    median: float
    infinite: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SummaryRow:
    """One label over all cases: a row of summary.json and summary.csv.

    Attributes:
        label: name of the label, or "mean" for the mean over all labels.
        cases: number of cases in which the label is scored (its Dice is not nan).
        missed: number of cases whose reference has the label and whose prediction has no voxel of
            it in the right place; in the row of all labels their sum.
        invented: number of cases whose prediction has the label and whose reference does not; in
            the row of all labels their sum.
        metrics: metric of `LabelScore` → its mean and median over the cases.
    """

    label: str
    cases: int
    missed: int
    invented: int
    metrics: Mapping[str, Mean]

    def columns(self) -> dict[str, Any]:
        """Return the row as written to summary.json and summary.csv.

        Keys are `label`, `cases`, `missed`, `invented` and, for each metric, `<metric>` (the mean),
        `<metric>_low`, `<metric>_high`, `<metric>_median` and, for metrics that can be infinite,
        `<metric>_infinite`.
        """
        columns: dict[str, Any] = {
            "label": self.label,
            "cases": self.cases,
            "missed": self.missed,
            "invented": self.invented,
        }
        for metric, value in self.metrics.items():
            columns[metric] = value.mean
            columns[f"{metric}_low"] = value.low
            columns[f"{metric}_high"] = value.high
            columns[f"{metric}_median"] = value.median
            if metric in CAN_BE_INFINITE:
                columns[f"{metric}_infinite"] = value.infinite
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
        low: lower end of the 95 % bootstrap interval of the difference.
        high: upper end of the interval.
        left_out: number of cases that both score, and one of them infinite, such as HD95 where a
            label was missed; they are in no mean.
        p_value: p-value of the paired, two-sided Wilcoxon signed-rank test; nan for fewer than 2
            cases, 1 if both results are equal in every case.
    """

    label: str
    cases: int
    ours: float
    theirs: float
    difference: float
    low: float
    high: float
    left_out: int
    p_value: float


def score_case(
    case: Case,
    prediction: Path | None,
    structures: Mapping[str, int | Sequence[int]],
    *,
    ignore_label: int | None = None,
    tolerance_mm: float = TOLERANCE_MM,
) -> list[ScoreRow]:
    """Return one row per label of one case, scored on the grid of its reference label map.

    Args:
        case: labelled case, with `case` (its name) and `label` (path of the reference label map).
        prediction: path of the predicted label map. If it is None or the file does not exist,
            because the case failed, it is scored as an empty prediction.
        structures: name of the label → its value in both label maps, or, of a region, all values
            that make it up; the background, 0, is not scored.
        ignore_label: value in the reference of voxels that count in neither map; None if there is
            no such value.
        tolerance_mm: tolerance of the surface Dice (`nsd`), mm.

    Raises:
        ReadError: a label map cannot be read.
        VolumeError: the reference has values other than those of `structures`.
        GeometryError: prediction and reference are on different grids.
    """
    values_of = {name: _as_values(values) for name, values in structures.items()}
    reference = read_label_map(case["label"], _known_values(values_of, ignore_label))
    predicted = np.zeros_like(reference.array)
    if prediction is not None and prediction.is_file():
        found = read(prediction)
        # a prediction is on the grid of its image
        check_label_grid(case["label"], reference, found)
        predicted = np.rint(found.array)
    if ignore_label is not None:
        predicted = np.where(reference.array == ignore_label, BACKGROUND, predicted)
    spacing = np.linalg.norm(reference.affine[:3, :3], axis=0)
    rows = []
    for label, values in values_of.items():
        if values == (BACKGROUND,):
            continue
        score = score_masks(
            _mask(predicted, values),
            _mask(reference.array, values),
            spacing,
            tolerance_mm=tolerance_mm,
        )
        rows.append(ScoreRow(case=case["case"], label=label, score=score))
    return rows


def _as_values(values: int | Sequence[int]) -> tuple[int, ...]:
    return (values,) if isinstance(values, int) else tuple(values)


def _known_values(values_of: Mapping[str, tuple[int, ...]], ignore_label: int | None) -> set[int]:
    """Return the values that a reference label map may have."""
    known = {BACKGROUND}.union(*values_of.values())
    return known if ignore_label is None else known | {ignore_label}


def _mask(labels: Array, values: tuple[int, ...]) -> Array:
    """Return where a label map has one of some values."""
    if len(values) == 1:
        return np.asarray(labels == values[0])
    return np.isin(labels, values)


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
    dice_of_case = mean_dice_of_cases(rows)
    return sorted(dice_of_case, key=lambda case: dice_of_case[case])[:count]


def mean_dice_of_cases(rows: Iterable[ScoreRow]) -> dict[str, float]:
    """Return case → mean Dice over its labels, for cases in which a label is scored."""
    dice_of_case: dict[str, list[float]] = {}
    for row in rows:
        if not isnan(row.score.dice):
            dice_of_case.setdefault(row.case, []).append(row.score.dice)
    return {case: fmean(values) for case, values in dice_of_case.items()}


def summarise_scores(rows: Iterable[ScoreRow], seed: int = 0) -> list[SummaryRow]:
    """Return the mean of each metric over cases: one row per label, and one for all labels.

    The last row is for the mean over labels: it averages over the labels of each case first, then
    over cases. With a single label it is left out. Values that are nan are skipped, and infinite
    ones counted. The 95 % intervals are bootstrap percentiles: the cases are resampled with
    replacement.

    Args:
        rows: scores of all cases, with the same labels for each case.
        seed: seed of the resampling.
    """
    by_label: dict[str, list[LabelScore]] = {}
    for row in rows:
        by_label.setdefault(row.label, []).append(row.score)
    tables = {label: _values_of_metrics(scores) for label, scores in by_label.items()}
    # Each row gets a generator of its own, so that a label's interval depends on no other label
    summary = [
        _summary_row(label, table, np.random.default_rng(seed)) for label, table in tables.items()
    ]
    if len(summary) > 1:
        mean = _mean_over_labels(list(tables.values()))
        summary.append(_row_of_all(mean, summary, np.random.default_rng(seed)))
    return summary


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
        means[metric] = _finite_mean(np.stack([table[metric] for table in tables]))
    return means


def _summary_row(label: str, table: Mapping[str, Array], random: np.random.Generator) -> SummaryRow:
    present = table["reference_ml"] > 0
    return SummaryRow(
        label=label,
        cases=int(np.isfinite(table["dice"]).sum()),
        missed=int((present & (table["dice"] == 0)).sum()),
        invented=int(((table["reference_ml"] == 0) & (table["volume_ml"] > 0)).sum()),
        metrics={metric: _bootstrap_mean(values, random) for metric, values in table.items()},
    )


def _row_of_all(
    table: Mapping[str, Array], labels: Sequence[SummaryRow], random: np.random.Generator
) -> SummaryRow:
    """Return the row of the mean over labels, with the counts of all labels together."""
    metrics = {}
    for metric, values in table.items():
        infinite = sum(row.metrics[metric].infinite for row in labels)
        metrics[metric] = replace(_bootstrap_mean(values, random), infinite=infinite)
    return SummaryRow(
        label=MEAN_LABEL,
        cases=int(np.isfinite(table["dice"]).sum()),
        missed=sum(row.missed for row in labels),
        invented=sum(row.invented for row in labels),
        metrics=metrics,
    )


def _bootstrap_mean(values: Array, random: np.random.Generator) -> Mean:
    """Return mean and median of the values that are not nan, with the mean's 95 % interval."""
    scored = values[~np.isnan(values)]
    if not len(scored):
        return Mean(mean=nan, low=nan, high=nan, median=nan, infinite=0)
    infinite, median = int(np.isinf(scored).sum()), _median(scored)
    finite = scored[np.isfinite(scored)]
    if not len(finite):
        return Mean(mean=inf, low=inf, high=inf, median=median, infinite=infinite)
    low, high = _bootstrap_interval(finite, random)
    return Mean(mean=float(finite.mean()), low=low, high=high, median=median, infinite=infinite)


def _median(values: Array) -> float:
    """Return the median; of an even number of values with infinite ones, the lower middle one."""
    if np.isfinite(values).all():
        return float(np.median(values))
    # the mean of the two in the middle would be inf where only one of them is
    return float(np.sort(values)[(len(values) - 1) // 2])


def _bootstrap_interval(values: Array, random: np.random.Generator) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the mean of finite values."""
    chosen = random.integers(len(values), size=(BOOTSTRAP_RESAMPLES, len(values)))
    means = values[chosen].mean(axis=1)
    low, high = np.percentile(means, INTERVAL_PERCENTILES)
    return float(low), float(high)


def _finite_mean(values: Array) -> Array:
    """Return the mean of the finite values along the first axis.

    Where there are none, it is inf if one of the values is infinite, else nan.
    """
    finite = np.isfinite(values)
    total = np.where(finite, values, 0).sum(axis=0)
    count = finite.sum(axis=0)
    empty = np.where(np.isinf(values).any(axis=0), inf, nan)
    mean: Array = np.divide(total, count, out=empty, where=count > 0)
    return mean


def compare_scores(
    ours: Iterable[ScoreRow], theirs: Iterable[ScoreRow], metric: str = "dice", seed: int = 0
) -> list[Comparison]:
    """Return one comparison per label: the means of a metric in two results, and a paired test.

    A case counts if both results have it with a finite value of the metric. With several labels,
    the last comparison is of the mean over the labels of each case.

    Args:
        ours: score rows of the first result.
        theirs: score rows of the second result.
        metric: name of a metric of `LabelScore`.
        seed: seed of the resampling of cases for the intervals.

    Raises:
        ConfigError: there is no such metric, or the results have no case, no label, or no finite
            value in common.
    """
    if metric not in METRICS:
        raise ConfigError(f"metric {metric}: no such metric; expected one of {', '.join(METRICS)}")
    our_values, their_values = _values_by_label(ours, metric), _values_by_label(theirs, metric)
    labels = [label for label in our_values if label in their_values]
    pairs = {label: _pairs(our_values[label], their_values[label]) for label in labels}
    if not any(len(found) for found in pairs.values()):
        raise ConfigError(_nothing_in_common(our_values, their_values, metric))
    if len(labels) > 1:
        pairs[MEAN_LABEL] = _mean_pairs(list(pairs.values()))
    return [
        _comparison(label, found, np.random.default_rng(seed))
        for label, found in pairs.items()
        if len(found)
    ]


def _values_by_label(rows: Iterable[ScoreRow], metric: str) -> dict[str, dict[str, float]]:
    """Return label → case → value of a metric, without values that are nan."""
    values: dict[str, dict[str, float]] = {}
    for row in rows:
        value = getattr(row.score, metric)
        cases = values.setdefault(row.label, {})
        if not isnan(value):
            cases[row.case] = value
    return values


def _pairs(ours: Mapping[str, float], theirs: Mapping[str, float]) -> dict[str, Array]:
    """Return case → (2,) its values in both results, for cases that both score."""
    return {case: np.array([ours[case], theirs[case]]) for case in ours if case in theirs}


def _mean_pairs(pairs: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    """Return case → (2,) means over the labels that both results score in it.

    Args:
        pairs: of each label.
    """
    of_case: dict[str, list[Array]] = {}
    for found in pairs:
        for case, values in found.items():
            of_case.setdefault(case, []).append(values)
    return {case: np.mean(values, axis=0) for case, values in of_case.items()}


def _nothing_in_common(
    ours: Mapping[str, Mapping[str, float]], theirs: Mapping[str, Mapping[str, float]], metric: str
) -> str:
    """Return why two results cannot be compared."""
    if not ours.keys() & theirs.keys():
        return (
            "the two results have no label in common: "
            f"{', '.join(ours) or 'none'} against {', '.join(theirs) or 'none'}"
        )
    cases = [
        sorted({case for found in result.values() for case in found}) for result in (ours, theirs)
    ]
    if not set(cases[0]) & set(cases[1]):
        first, second = (", ".join(names[:NAMED_CASES]) or "none" for names in cases)
        return (
            f"the two results have no case in common with a value of {metric} "
            f"({first}, … against {second}, …): compare results of the same cases"
        )
    return f"the two results have no label and case in common with a value of {metric}"


def _comparison(label: str, pairs: Mapping[str, Array], random: np.random.Generator) -> Comparison:
    """Return the comparison of one label.

    Args:
        label: name of the label.
        pairs: case → (2,) its values in the first and the second result.
        random: of the resampling.
    """
    both = np.stack(list(pairs.values()))
    finite = both[np.isfinite(both).all(axis=1)]
    ours, theirs = finite[:, 0], finite[:, 1]
    difference = ours - theirs
    low, high = _bootstrap_interval(difference, random) if len(finite) else (nan, nan)
    return Comparison(
        label=label,
        cases=len(finite),
        ours=float(ours.mean()) if len(finite) else nan,
        theirs=float(theirs.mean()) if len(finite) else nan,
        difference=float(difference.mean()) if len(finite) else nan,
        low=low,
        high=high,
        left_out=len(both) - len(finite),
        p_value=_p_value(ours, theirs),
    )


def _p_value(ours: Array, theirs: Array) -> float:
    if len(ours) < 2:
        return nan
    if np.array_equal(ours, theirs):
        return 1.0  # scipy's test is undefined where all differences are 0
    return float(wilcoxon(ours, theirs).pvalue)
