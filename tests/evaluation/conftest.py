"""Fixtures of the evaluation tests."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.types import Array


@pytest.fixture
def label_maps() -> tuple[Array, Array]:
    """A reference and a prediction with the values 0 to 3, which agree in most voxels."""
    random = np.random.default_rng(4)
    reference, other = (random.integers(0, 4, (7, 8, 9)).astype(np.uint8) for _ in range(2))
    return reference, np.where(random.random((7, 8, 9)) < 0.7, reference, other)
