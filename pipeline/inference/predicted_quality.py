"""The Dice that a segmentation is predicted to have, with an interval, from its features.

A fit is a fractional logit: the Dice is the logistic function of a weighted sum of features. The
interval is that of split conformal prediction: quantiles of residuals of cases that were not
fitted, in units of a spread that grows as the predicted Dice falls. `pipeline.evaluation` makes
fits; a bundle keeps them as JSON (`models/quality.json`).

References:
    Papke, Wooldridge: Econometric methods for fractional response variables. Journal of Applied
    Econometrics 11, 619-632 (1996).
    Lei et al.: Distribution-free predictive inference for regression. Journal of the American
    Statistical Association 113, 1094-1111 (2018).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import isnan, nan
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import ConfigError
from pipeline.inference.quality_features import (
    CASE_FEATURES,
    LABEL_FEATURES,
    QualityFeatures,
)
from pipeline.io import read_json, write_json

Form = Literal["linear", "absolute"]
FORMAT = 1  # of quality.json, to be raised when its keys change their meaning
COVERAGE = 0.9  # of the interval
LOW_DICE = 0.7  # below it, a case is to be looked at
# residuals are divided by this plus 1 - Dice, because a low Dice is harder to predict
SPREAD_OFFSET = 0.05
# features are clipped at this many spreads from the centre of the fitted cases: a straight line
# says nothing about what is far outside
LARGEST_DEVIATION = 4.0
# features of a structure whose means over all structures tell how good the case as a whole is
SHARED_FEATURES = ("entropy", "border_entropy", "mirror_dice", "networks_dice", "contrast")
# agreements whose mean over the structures with the least one tells how good the case is, too
AGREEMENTS = ("mirror_dice", "networks_dice")
WORST_FRACTION = 0.1  # of the structures, by their agreement


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """A predicted Dice.

    Attributes:
        value: predicted Dice, 0 to 1.
        low: lower end of its 90 % interval.
        high: upper end.
    """

    value: float
    low: float
    high: float

    def columns(self) -> dict[str, float]:
        """Return `dice`, `low` and `high` for a record."""
        return {
            "dice": round(self.value, 4),
            "low": round(self.low, 4),
            "high": round(self.high, 4),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class PredictedDice:
    """The predicted Dice of one case.

    Attributes:
        mean: of the mean over all structures.
        labels: structure that has voxels → its own; a structure that was not fitted is left out.
    """

    mean: Interval
    labels: Mapping[str, Interval]

    def columns(self) -> dict[str, Any]:
        """Return `mean` and `labels` as plain values for a record."""
        labels = {name: interval.columns() for name, interval in self.labels.items()}
        return {"mean": self.mean.columns(), "labels": labels}


@dataclass(frozen=True, kw_only=True, slots=True)
class Term:
    """One term of a fit: a weighted feature.

    Attributes:
        feature: name of the feature.
        form: `linear`, or `absolute` for the distance from the centre.
        centre: value of the feature that counts as 0; also where it is unknown.
        scale: what counts as 1.
        weight: factor of the term.
    """

    feature: str
    form: Form
    centre: float
    scale: float
    weight: float

    def value(self, row: Mapping[str, float]) -> float:
        """Return the feature of a case in units of the scale, before it is weighted."""
        return float(self.values(np.array([row.get(self.feature, nan)]))[0])

    def values(self, column: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the feature of several cases, (N,), in units of the scale."""
        relative = (column - self.centre) / self.scale
        bounded = np.clip(np.nan_to_num(relative), -LARGEST_DEVIATION, LARGEST_DEVIATION)
        found: NDArray[np.float64] = np.abs(bounded) if self.form == "absolute" else bounded
        return found


@dataclass(frozen=True, kw_only=True, slots=True)
class DiceFit:
    """A fit of the Dice of one structure, or of the mean over all.

    Attributes:
        intercept: of the logit.
        terms: the features.
        low: quantile of the residuals for the lower end, in units of the spread; None if there
            were too few cases for one, and the lower end is 0.
        high: the same for the upper end, which is 1 without it.
        cases: number of cases that were fitted.
    """

    intercept: float
    terms: tuple[Term, ...]
    low: float | None
    high: float | None
    cases: int

    def predict(self, row: Mapping[str, float]) -> Interval:
        """Return the predicted Dice.

        Args:
            row: feature → value, from `mean_row` or `label_row`; unknown ones are left out or nan.
        """
        logit = self.intercept + sum(term.weight * term.value(row) for term in self.terms)
        value = float(logistic(np.array([logit]))[0])
        spread = residual_spread(value)
        low = 0.0 if self.low is None else value + self.low * spread
        high = 1.0 if self.high is None else value + self.high * spread
        # a bias of the fit may put the prediction outside of its own quantiles
        return Interval(value=value, low=min(max(low, 0.0), value), high=max(min(high, 1.0), value))


@dataclass(frozen=True, kw_only=True, slots=True)
class QualityModel:
    """The fits of a bundle, from models/quality.json.

    Attributes:
        mean: fit of the mean Dice over all structures.
        labels: structure → fit of its Dice; structures without a scored case are left out.
        weights_sha256: hash of the weights whose segmentations were fitted.
        fitted_on: what the cases were, in words.
        versions: package → version that made the fit.
        scores: figures on cases that were not fitted, for information.
    """

    mean: DiceFit
    labels: Mapping[str, DiceFit]
    weights_sha256: str
    fitted_on: str
    versions: Mapping[str, str] = field(default_factory=dict)
    scores: Sequence[Mapping[str, Any]] = ()

    def predict(self, features: QualityFeatures) -> PredictedDice:
        """Return the predicted Dice of a case.

        Without any structure in the label map it is 0: whatever is there was missed.
        """
        if not features.labels:
            return PredictedDice(mean=Interval(value=0.0, low=0.0, high=0.0), labels={})
        shared = mean_row(features)
        labels = {}
        for name, row in features.labels.items():
            if name in self.labels:
                labels[name] = self.labels[name].predict(label_row(row, shared))
        return PredictedDice(mean=self.mean.predict(shared), labels=labels)


def write_quality(path: Path, model: QualityModel) -> None:
    """Write the fits of a bundle as JSON."""
    write_json(path, {"format": FORMAT, "coverage": COVERAGE, **asdict(model)})


def read_quality(path: Path) -> QualityModel | None:
    """Return the fits of a bundle; None if the file does not exist.

    Raises:
        ConfigError: the file holds something else.
    """
    if not path.is_file():
        return None
    content = read_json(path)
    try:
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']}")
        labels = {str(name): _fit(part) for name, part in content["labels"].items()}
        return QualityModel(
            mean=_fit(content["mean"]),
            labels=labels,
            weights_sha256=str(content["weights_sha256"]),
            fitted_on=str(content["fitted_on"]),
            versions=dict(content["versions"]),
            scores=tuple(content["scores"]),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{path}: expected the fits of a predicted Dice, format {FORMAT}, found "
            f"{type(error).__name__}: {error}; remove the file, or fit it again"
        ) from error


def _fit(content: Mapping[str, Any]) -> DiceFit:
    terms = []
    for part in content["terms"]:
        if part["form"] not in ("linear", "absolute") or not float(part["scale"]) > 0:
            raise ValueError(f"a term is {part}")
        terms.append(Term(**part))
    ends = [None if content[end] is None else float(content[end]) for end in ("low", "high")]
    fit = DiceFit(
        intercept=float(content["intercept"]),
        terms=tuple(terms),
        low=ends[0],
        high=ends[1],
        cases=int(content["cases"]),
    )
    if not np.isfinite([fit.intercept, *(term.weight for term in terms)]).all():
        raise ValueError("a weight is not finite")
    return fit


def logistic(logit: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the logistic function, which is from 0 to 1."""
    found: NDArray[np.float64] = 0.5 * (1 + np.tanh(logit / 2))  # does not overflow
    return found


def residual_spread(dice: Any) -> Any:
    """Return the unit of residuals at a predicted Dice, or at several."""
    return SPREAD_OFFSET + 1 - dice


def mean_row(features: QualityFeatures) -> dict[str, float]:
    """Return the features of the mean Dice: those of the case, and means over its structures.

    `worst_mirror_dice` is the mean over the tenth of the structures where mirror images agree
    least, and `worst_networks_dice` the same of both networks of a cascade.
    """
    row = {name: features.case.get(name, nan) for name in CASE_FEATURES}
    for name in LABEL_FEATURES:
        values = [label.get(name, nan) for label in features.labels.values()]
        row[f"mean_{name}"] = _known_mean(values)
    for name in AGREEMENTS:
        known = [label.get(name, nan) for label in features.labels.values()]
        agreement = sorted(value for value in known if not isnan(value))
        count = max(1, round(WORST_FRACTION * len(agreement)))
        row[f"worst_{name}"] = _known_mean(agreement[:count])
    return row


def label_row(row: Mapping[str, float], shared: Mapping[str, float]) -> dict[str, float]:
    """Return the features of the Dice of one structure: its own, and those of the case.

    Args:
        row: features of the structure.
        shared: features of the case, from `mean_row`.
    """
    own = {name: row.get(name, nan) for name in LABEL_FEATURES}
    case = [*CASE_FEATURES, *(f"mean_{name}" for name in SHARED_FEATURES)]
    return own | {name: shared.get(name, nan) for name in case}


def _known_mean(values: Sequence[float]) -> float:
    known = [value for value in values if not isnan(value)]
    return float(np.mean(known)) if known else nan


def quality_warning(predicted: PredictedDice) -> str:
    """Return the warning on a low predicted Dice; empty if it is not low."""
    mean = predicted.mean
    if mean.value >= LOW_DICE and mean.high >= LOW_DICE:
        return ""
    surely = ", its upper end too" if mean.high < LOW_DICE else ""
    return (
        f"predicted Dice {mean.value:.2f} ({mean.low:.2f} to {mean.high:.2f}) is below "
        f"{LOW_DICE:g}{surely}: look at it"
    )
