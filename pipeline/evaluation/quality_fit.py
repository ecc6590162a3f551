"""Fitting the Dice that `pipeline.inference.predicted_quality` predicts, and scoring the fit.

Everything that is chosen or estimated from cases keeps their groups together: cases of one anatomy,
or of one fold of a cross-validation, are never fitted and scored at the same time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from math import ceil, floor, isnan, nan
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from pipeline.inference import (
    COVERAGE,
    LOW_DICE,
    DiceFit,
    Interval,
    QualityFeatures,
    QualityModel,
    Term,
    label_row,
    logistic,
    mean_row,
    residual_spread,
)

MEAN_LABEL = "mean"  # name of the row of scores for the mean over all structures
FOLDS = 5  # of the groups, to choose the penalty and to get residuals
# candidates for the penalty on squared weights; the last one leaves the intercept alone
PENALTIES = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 1e9)
# a Dice of exactly 0 or 1 has no logit
LOWEST_DICE = 0.005
NEWTON_STEPS = 30
RANK_TOLERANCE = 1e-9
NORMAL_QUARTILES = 1.349  # quartile range of a normal distribution, in standard deviations
# features that are as telling when they are too low as when they are too high
TWO_SIDED = ("log_volume", "mean_log_volume", "soft_ratio", "kept", "deviation")
Row = Mapping[str, float]
Column = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class QualityCase:
    """A segmented case whose Dice is known.

    Attributes:
        case: its name.
        group: cases of one group are never on both sides of a split.
        features: its features.
        dice: structure → Dice; nan where neither map has the structure.
    """

    case: str
    group: str
    features: QualityFeatures
    dice: Mapping[str, float]

    @property
    def mean_dice(self) -> float:
        """Mean Dice over the structures that are scored; nan if none is."""
        known = [value for value in self.dice.values() if not isnan(value)]
        return float(np.mean(known)) if known else nan


@dataclass(frozen=True, kw_only=True, slots=True)
class QualityScore:
    """How well the Dice of one structure, or the mean, is predicted for cases that were not fitted.

    Attributes:
        label: name of the structure, or `mean`.
        cases: number of cases.
        mae: mean absolute error.
        mae_constant: the same of a prediction that is always the mean of these cases' Dice.
        coverage: fraction of the cases whose Dice is in the interval.
        width: mean width of the interval.
        low: number of cases with a Dice below 0.7.
        auroc: area under the ROC curve for such a Dice; nan if no case, or every case, has one.
        correlation: Pearson's, with the true Dice; nan if either does not vary.
    """

    label: str
    cases: int
    mae: float
    mae_constant: float
    coverage: float
    width: float
    low: int
    auroc: float
    correlation: float

    def columns(self) -> dict[str, Any]:
        """Return the row as plain values; None where a figure is nan."""
        row = asdict(self)
        return {key: None if value != value else value for key, value in row.items()}


def fit_quality(
    cases: Sequence[QualityCase],
    structures: Sequence[str],
    *,
    weights_sha256: str,
    fitted_on: str,
    scores: Sequence[QualityScore] = (),
) -> QualityModel | None:
    """Return the fits for a bundle; None if no case has a score.

    Args:
        cases: cases whose Dice is known.
        structures: names of the structures.
        weights_sha256: hash of the weights that segmented them.
        fitted_on: what the cases are, in words.
        scores: figures on cases that are not among them.
    """
    known = [case for case in cases if not isnan(case.mean_dice) and case.features.labels]
    if not known:
        return None
    shared = [mean_row(case.features) for case in known]
    groups = [case.group for case in known]
    labels = {}
    for name in structures:
        rows, dice, of = [], [], []
        for case, row in zip(known, shared, strict=True):
            if name in case.features.labels and not isnan(case.dice.get(name, nan)):
                rows.append(label_row(case.features.labels[name], row))
                dice.append(case.dice[name])
                of.append(case.group)
        if rows:
            labels[name] = fit_dice(rows, np.array(dice), of)
    return QualityModel(
        mean=fit_dice(shared, np.array([case.mean_dice for case in known]), groups),
        labels=labels,
        weights_sha256=weights_sha256,
        fitted_on=fitted_on,
        versions={name: version(name) for name in ("volseg", "numpy")},
        scores=tuple(score.columns() for score in scores),
    )


def fit_dice(rows: Sequence[Row], dice: Column, groups: Sequence[str]) -> DiceFit:
    """Return the fit of a Dice to features.

    The penalty is the one with the smallest mean absolute error over folds of the groups, and the
    residuals of these folds give the interval.

    Args:
        rows: feature → value of each case; the first one names the features.
        dice: (N,) Dice of the cases.
        groups: group of each case.
    """
    folds = _folds(groups)
    found = [_out_of_fold(rows, dice, folds, penalty) for penalty in PENALTIES]
    errors = [np.abs(predicted - dice).mean() for predicted in found]
    best = int(np.argmin(errors))
    predicted = found[best]
    residuals = (dice - predicted) / residual_spread(predicted)
    terms = _terms(rows)
    intercept, weights = _fractional_logit(_design(terms, rows), dice, PENALTIES[best])
    kept = [_weighted(term, float(weight)) for term, weight in zip(terms, weights, strict=True)]
    low, high = conformal_quantiles(residuals)
    return DiceFit(
        intercept=intercept,
        terms=tuple(term for term in kept if abs(term.weight) > 1e-6),
        low=low,
        high=high,
        cases=len(dice),
    )


def conformal_quantiles(residuals: Column) -> tuple[float | None, float | None]:
    """Return the ends of an interval that a new residual is in with probability `COVERAGE`.

    Args:
        residuals: (N,) residuals of cases that were not fitted.

    Returns:
        for each end None if there are too few residuals to bound it.
    """
    ordered = np.sort(residuals)
    count, tail = len(ordered), (1 - COVERAGE) / 2
    # 0.05 · 20 is a little less than 1 in floating point
    below = floor(tail * (count + 1) + RANK_TOLERANCE)
    above = ceil((1 - tail) * (count + 1) - RANK_TOLERANCE)
    low = float(ordered[below - 1]) if below >= 1 else None
    high = float(ordered[above - 1]) if above <= count else None
    return low, high


def _folds(groups: Sequence[str]) -> NDArray[np.int64]:
    """Return the fold of each case, (N,): groups stay together, a single group is split."""
    names = sorted(set(groups))
    if len(names) == 1:
        return np.arange(len(groups)) % FOLDS
    number = {name: i % FOLDS for i, name in enumerate(names)}
    return np.array([number[group] for group in groups])


def _out_of_fold(
    rows: Sequence[Row], dice: Column, folds: NDArray[np.int64], penalty: float
) -> Column:
    """Return the Dice of each case, (N,), predicted by a fit of the other folds."""
    predicted = np.full(len(dice), float(dice.mean()))
    for fold in np.unique(folds):
        held_out = folds == fold
        if held_out.all():  # one case, or few: there is nothing to fit
            continue
        others = [row for row, out in zip(rows, held_out, strict=True) if not out]
        own = [row for row, out in zip(rows, held_out, strict=True) if out]
        terms = _terms(others)
        intercept, weights = _fractional_logit(_design(terms, others), dice[~held_out], penalty)
        predicted[held_out] = logistic(intercept + _design(terms, own) @ weights)
    return predicted


def _terms(rows: Sequence[Row]) -> list[Term]:
    """Return the terms of a fit, without weights: the features that vary over the cases."""
    terms = []
    for name in rows[0]:
        values = np.array([row.get(name, nan) for row in rows], dtype=np.float64)
        known = values[np.isfinite(values)]
        if not len(known):
            continue
        low, centre, high = np.percentile(known, [25, 50, 75])
        scale = float(max((high - low) / NORMAL_QUARTILES, known.std() / 3))
        if scale <= 1e-9 * max(1.0, abs(centre)):
            continue
        terms.append(
            Term(feature=name, form="linear", centre=float(centre), scale=scale, weight=0.0)
        )
        if name in TWO_SIDED:
            terms.append(
                Term(feature=name, form="absolute", centre=float(centre), scale=scale, weight=0.0)
            )
    return terms


def _weighted(term: Term, weight: float) -> Term:
    return Term(
        feature=term.feature,
        form=term.form,
        centre=term.centre,
        scale=term.scale,
        weight=weight,
    )


def _design(terms: Sequence[Term], rows: Sequence[Row]) -> NDArray[np.float64]:
    """Return the value of each term in each case, (N, terms)."""
    columns = []
    for term in terms:
        column = np.array([row.get(term.feature, nan) for row in rows], dtype=np.float64)
        columns.append(term.values(column))
    return np.stack(columns, axis=1) if columns else np.zeros((len(rows), 0))


def _fractional_logit(
    design: NDArray[np.float64], dice: Column, penalty: float
) -> tuple[float, Column]:
    """Return intercept and weights of a fractional logit with a penalty on squared weights.

    Args:
        design: (N, terms) values.
        dice: (N,) values from 0 to 1.
        penalty: factor of half the sum of the squared weights.
    """
    target = np.clip(dice, LOWEST_DICE, 1 - LOWEST_DICE)
    full = np.column_stack([np.ones(len(target)), design])
    ridge = np.full(full.shape[1], penalty)
    ridge[0] = 1e-9
    weights = np.zeros(full.shape[1])
    mean = target.mean()
    weights[0] = np.log(mean / (1 - mean))
    loss = _loss(full, target, ridge, weights)
    for _ in range(NEWTON_STEPS):
        fitted = logistic(full @ weights)
        gradient = full.T @ (fitted - target) + ridge * weights
        curvature = (full.T * (fitted * (1 - fitted))) @ full + np.diag(ridge)
        step = np.linalg.solve(curvature + 1e-9 * np.eye(len(weights)), gradient)
        # the problem is convex: a step that is halved often enough descends
        for _half in range(20):
            candidate = _loss(full, target, ridge, weights - step)
            if candidate <= loss:
                break
            step = step / 2
        else:
            break
        weights, gain, loss = weights - step, loss - candidate, candidate
        if gain < 1e-10:
            break
    return float(weights[0]), weights[1:]


def _loss(design: NDArray[np.float64], target: Column, ridge: Column, weights: Column) -> float:
    logit = design @ weights
    cross_entropy = np.logaddexp(0, logit) - target * logit
    return float(cross_entropy.sum() + 0.5 * (ridge * weights**2).sum())


def nested_quality(cases: Sequence[QualityCase], structures: Sequence[str]) -> list[QualityScore]:
    """Return how well each group's Dice is predicted by a fit of the other groups.

    Args:
        cases: cases whose Dice is known; empty scores with fewer than two groups.
        structures: names of the structures.
    """
    groups = sorted({case.group for case in cases})
    if len(groups) < 2:
        return []
    predicted: list[tuple[QualityCase, QualityModel]] = []
    for group in groups:
        others = [case for case in cases if case.group != group]
        model = fit_quality(others, structures, weights_sha256="", fitted_on="")
        if model is not None:
            predicted += [(case, model) for case in cases if case.group == group]
    return _scores(predicted, structures)


def score_quality(
    model: QualityModel, cases: Sequence[QualityCase], structures: Sequence[str]
) -> list[QualityScore]:
    """Return how well a fit predicts the Dice of cases: the mean first, then each structure.

    Args:
        model: the fit.
        cases: cases that were not fitted.
        structures: names of the structures.
    """
    return _scores([(case, model) for case in cases], structures)


def _scores(
    predicted: Sequence[tuple[QualityCase, QualityModel]], structures: Sequence[str]
) -> list[QualityScore]:
    pairs: dict[str, list[tuple[Interval, float]]] = {
        name: [] for name in (MEAN_LABEL, *structures)
    }
    for case, model in predicted:
        found = model.predict(case.features)
        if not isnan(case.mean_dice):
            pairs[MEAN_LABEL].append((found.mean, case.mean_dice))
        for name in structures:
            dice = case.dice.get(name, nan)
            if name in found.labels and not isnan(dice):
                pairs[name].append((found.labels[name], dice))
    return [_score(name, rows) for name, rows in pairs.items() if rows]


def _score(label: str, pairs: Sequence[tuple[Interval, float]]) -> QualityScore:
    true = np.array([dice for _, dice in pairs])
    value = np.array([interval.value for interval, _ in pairs])
    low = np.array([interval.low for interval, _ in pairs])
    high = np.array([interval.high for interval, _ in pairs])
    return QualityScore(
        label=label,
        cases=len(true),
        mae=float(np.abs(value - true).mean()),
        mae_constant=float(np.abs(true.mean() - true).mean()),
        coverage=float(((low <= true) & (true <= high)).mean()),
        width=float((high - low).mean()),
        low=int((true < LOW_DICE).sum()),
        auroc=auroc(true < LOW_DICE, -value),
        correlation=_correlation(value, true),
    )


def auroc(positive: NDArray[np.bool_], score: Column) -> float:
    """Return the area under the ROC curve; nan without positive or without negative cases.

    Args:
        positive: (N,) which cases are to be found.
        score: (N,) higher where a case is taken for one of them.
    """
    count, others = int(positive.sum()), int((~positive).sum())
    if not count or not others:
        return nan
    ranks = rankdata(score)
    return float((ranks[positive].sum() - count * (count + 1) / 2) / (count * others))


def _correlation(a: Column, b: Column) -> float:
    if len(a) < 2 or np.ptp(a) < 1e-12 or np.ptp(b) < 1e-12:
        return nan
    return float(np.corrcoef(a, b)[0, 1])
