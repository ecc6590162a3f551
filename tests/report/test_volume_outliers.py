"""Volumes that stand out in a batch."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import median_abs_deviation

from pipeline.report.outliers import LIMIT, MIN_CASES, usual_range


def normal_volumes(count: int = 41, seed: int = 0) -> list[float]:
    random = np.random.default_rng(seed)
    return list(4000 * np.exp(0.1 * random.normal(size=count)))


def test_the_limits_are_those_of_the_modified_z_score() -> None:
    """scipy's median absolute deviation, scaled as a standard deviation, is the oracle."""
    volumes = normal_volumes()
    found = usual_range(volumes)
    logs = np.log(volumes)
    deviation = median_abs_deviation(logs, scale="normal")
    assert found.median == pytest.approx(np.median(volumes))
    assert math.log(found.high / found.median) == pytest.approx(LIMIT * deviation, rel=1e-4)
    assert math.log(found.median / found.low) == pytest.approx(LIMIT * deviation, rel=1e-4)


def test_half_and_double_stand_out_and_the_others_do_not() -> None:
    volumes = normal_volumes()
    found = usual_range([*volumes, 2000.0, 8000.0, 0.0])
    assert found.is_outlier(2000.0)
    assert found.is_outlier(8000.0)
    assert found.is_outlier(0.0)
    assert not any(found.is_outlier(volume) for volume in volumes)


def test_outliers_do_not_hide_each_other() -> None:
    """A third of wild volumes does not widen the range as a standard deviation would."""
    found = usual_range([*normal_volumes(40), *[40000.0] * 15])
    assert found.is_outlier(40000.0)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e6])
def test_the_unit_does_not_matter(scale: float) -> None:
    volumes = [*normal_volumes(), 1500.0]
    one, other = usual_range(volumes), usual_range([scale * volume for volume in volumes])
    assert other.low == pytest.approx(scale * one.low)
    assert other.high == pytest.approx(scale * one.high)


@pytest.mark.parametrize(
    "volumes", [[], [math.nan], [0.0, 0.0], [5.0], [5.0] * 30, normal_volumes(MIN_CASES - 1)]
)
def test_nothing_is_marked_without_a_spread(volumes: list[float]) -> None:
    found = usual_range(volumes)
    assert not any(found.is_outlier(volume) for volume in (*volumes, 1.0, 1e9))
