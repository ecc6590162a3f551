"""The fit of the predicted Dice: what it recovers, what it does at the edges, how it is scored."""

from __future__ import annotations

import json
from math import isnan, nan
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import ConfigError
from pipeline.evaluation.quality_fit import (
    QualityCase,
    auroc,
    conformal_quantiles,
    fit_dice,
    fit_quality,
    nested_quality,
    score_quality,
)
from pipeline.inference.predicted_quality import (
    Interval,
    PredictedDice,
    QualityModel,
    quality_warning,
    read_quality,
    write_quality,
)
from pipeline.inference.quality_features import CASE_FEATURES, LABEL_FEATURES, QualityFeatures

STRUCTURES = ("front", "back")


def made_up(count: int, *, seed: int = 0, noise: float = 0.02) -> list[QualityCase]:
    """Cases whose Dice falls with the entropy of their labels; other features say nothing."""
    random = np.random.default_rng(seed)
    cases = []
    for number in range(count):
        bad = random.beta(1, 2)
        labels, dice = {}, {}
        for name in STRUCTURES:
            row = dict(zip(LABEL_FEATURES, random.normal(size=len(LABEL_FEATURES)), strict=True))
            row["entropy"] = 0.05 + 0.4 * bad + 0.02 * random.normal()
            labels[name] = row
            dice[name] = float(np.clip(0.95 - 0.6 * bad + noise * random.normal(), 0, 1))
        features = QualityFeatures(
            case=dict(zip(CASE_FEATURES, random.normal(size=len(CASE_FEATURES)), strict=True)),
            labels=labels,
        )
        cases.append(
            QualityCase(case=f"c{number}", group=str(number % 7), features=features, dice=dice)
        )
    return cases


def fitted(cases: list[QualityCase]) -> QualityModel:
    found = fit_quality(cases, STRUCTURES, weights_sha256="abc", fitted_on="made-up cases")
    assert found is not None
    return found


@pytest.mark.slow
def test_a_relation_is_found_and_the_interval_covers() -> None:
    """On cases that were not fitted: a small error, nine of ten in the interval, low ones found."""
    scores = score_quality(fitted(made_up(150)), made_up(600, seed=1), STRUCTURES)
    assert [score.label for score in scores] == ["mean", *STRUCTURES]
    for score in scores:
        assert score.mae < 0.035 < score.mae_constant
        assert 0.83 <= score.coverage <= 0.97  # 150 cases fix the quantiles to about 0.03
        assert score.auroc > 0.95
        assert score.correlation > 0.95
        assert score.width < 0.2
    nested = nested_quality(made_up(150), STRUCTURES)
    assert [score.cases for score in nested] == [150] * 3
    assert nested[0].mae < 0.035


def test_features_that_say_nothing_predict_the_mean() -> None:
    """Dice that no feature explains is predicted by about its mean, with a wide interval."""
    random = np.random.default_rng(2)
    rows = [{"a": float(a)} for a in random.normal(size=200)]
    dice = random.uniform(0.4, 0.9, 200)
    fit = fit_dice(rows, dice, [str(i % 5) for i in range(200)])
    found = fit.predict({"a": 0.3})
    assert found.value == pytest.approx(dice.mean(), abs=0.03)
    assert found.high - found.low > 0.35


def test_the_file_holds_the_same_fit(tmp_path: Path) -> None:
    """JSON of plain values, equal after it is read; the same predictions, bit for bit."""
    model = fitted(made_up(60))
    path = tmp_path / "models" / "quality.json"
    write_quality(path, model)
    found = read_quality(path)
    assert found is not None
    assert found.labels == model.labels
    assert found.mean == model.mean
    case = made_up(1, seed=5)[0]
    assert found.predict(case.features) == model.predict(case.features)
    assert read_quality(tmp_path / "nothing.json") is None


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("format", 9),
        ("labels", []),
        ("mean", None),
        ("weights_sha256", ...),
        ("mean", {"intercept": 0, "terms": [{}], "low": None, "high": None, "cases": 1}),
        (
            "mean",
            {"intercept": float("nan"), "terms": [], "low": None, "high": None, "cases": 1},
        ),
    ],
)
def test_a_file_with_something_else_is_refused(key: str, value: object, tmp_path: Path) -> None:
    path = tmp_path / "quality.json"
    write_quality(path, fitted(made_up(10)))
    content = json.loads(path.read_text())
    content[key] = value
    if value is ...:
        del content[key]
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"quality\.json: expected the fits of a predicted Dice"):
        read_quality(path)


@pytest.mark.slow
def test_few_and_equal_cases() -> None:
    """One case, two, equal Dice, constant features, and Dice that are not scored."""
    one = made_up(1)
    found = fitted(one).predict(one[0].features)
    assert found.mean.value == pytest.approx(one[0].mean_dice, abs=0.01)
    assert (found.mean.low, found.mean.high) == (0, 1)  # nothing is known of the error
    for case in made_up(5, seed=9):
        interval = fitted(made_up(2)).predict(case.features).mean
        assert 0 <= interval.low <= interval.value <= interval.high <= 1

    for value in (0.0, 0.8, 1.0):
        equal = [
            QualityCase(
                case=case.case,
                group=case.group,
                features=case.features,
                dice=dict.fromkeys(STRUCTURES, value),
            )
            for case in made_up(40)
        ]
        prediction = fitted(equal).predict(made_up(1, seed=3)[0].features)
        assert prediction.mean.value == pytest.approx(value, abs=0.01)
        score = score_quality(fitted(equal), equal, STRUCTURES)[0]
        assert isnan(score.auroc)
        assert isnan(score.correlation)

    same = QualityFeatures(case={}, labels={"front": {}, "back": {}})
    constant = [
        QualityCase(case=case.case, group=case.group, features=same, dice=case.dice)
        for case in made_up(40)
    ]
    assert fitted(constant).mean.terms == ()
    assert nested_quality([case for case in constant if case.group == "0"], STRUCTURES) == []

    nothing = [QualityCase(case="c", group="g", features=same, dice=dict.fromkeys(STRUCTURES, nan))]
    assert fit_quality(nothing, STRUCTURES, weights_sha256="", fitted_on="") is None
    assert nested_quality(nothing, STRUCTURES) == []


def test_labels_that_are_missing() -> None:
    """A structure without voxels has no prediction, one that no map has is not fitted."""
    cases = []
    for number, case in enumerate(made_up(60)):
        labels, dice = dict(case.features.labels), dict(case.dice)
        if number % 2:
            del labels["back"]
            dice["back"] = 0.0 if number % 4 == 1 else nan
        features = QualityFeatures(case=case.features.case, labels=labels)
        cases.append(
            QualityCase(case=case.case, group=case.group, features=features, dice=dice | {"x": nan})
        )
    model = fit_quality(cases, (*STRUCTURES, "x"), weights_sha256="", fitted_on="")
    assert model is not None
    assert set(model.labels) == set(STRUCTURES)
    assert model.labels["back"].cases == 30
    assert set(model.predict(cases[1].features).labels) == {"front"}
    empty = model.predict(QualityFeatures(case={}, labels={}))
    assert empty == PredictedDice(mean=Interval(value=0.0, low=0.0, high=0.0), labels={})


def test_conformal_quantiles_are_of_the_right_rank() -> None:
    """Of 19 residuals the ends are the lowest and the highest; fewer bound nothing."""
    residuals = np.random.default_rng(0).normal(size=19)
    assert conformal_quantiles(residuals) == (residuals.min(), residuals.max())
    assert conformal_quantiles(residuals[:18]) == (None, None)


def test_auroc_is_the_share_of_pairs_in_the_right_order() -> None:
    positive = np.array([True, False, True, False, False])
    score = np.array([0.9, 0.8, 0.3, 0.3, 0.1])
    pairs = [(a > b) + 0.5 * (a == b) for a in score[positive] for b in score[~positive]]
    assert auroc(positive, score) == pytest.approx(np.mean(pairs))
    assert isnan(auroc(np.zeros(3, dtype=bool), np.zeros(3)))


@pytest.mark.parametrize(
    ("interval", "words"),
    [
        ((0.9, 0.8, 0.95), ""),
        ((0.71, 0.5, 0.8), ""),
        ((0.69, 0.5, 0.8), "predicted Dice 0.69 (0.50 to 0.80) is below 0.7: look at it"),
        ((0.4, 0.3, 0.6), "is below 0.7, its upper end too: look at it"),
    ],
)
def test_a_low_dice_is_a_warning(interval: tuple[float, float, float], words: str) -> None:
    value, low, high = interval
    mean = Interval(value=value, low=low, high=high)
    warning = quality_warning(PredictedDice(mean=mean, labels={}))
    assert warning.endswith(words)
    assert bool(warning) == bool(words)
