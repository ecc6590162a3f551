"""The cache of training cases: as many as fit, and the same patches with and without it."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
from monai.utils import set_determinism
from phantom import RUN, nifti, parse_spec, smooth

from pipeline.config.parser import parse_config
from pipeline.config.run import Run
from pipeline.training import case_cache
from pipeline.training.case_cache import GB, CaseCache, host_bytes, training_dataset
from pipeline.transforms import preprocessing, training_transform
from pipeline.transforms.patches import CentreVoxels


def cases(count: int = 4) -> list[dict[str, Any]]:
    found = []
    for i in range(count):
        array = smooth(seed=i)
        found.append(
            {
                "case": f"case_{i}",
                "image": nifti(array),
                "label": nifti(np.where(array > 120, 7, 0).astype(np.uint8)),
            }
        )
    return found


def dataset(cache_gb: float | None, names: list[int] | None = None, **run: Any) -> CaseCache:
    spec = parse_spec()
    settings = parse_config(Run, RUN | {"cache_gb": cache_gb} | run, "run")
    transform = training_transform(preprocessing(spec), spec, settings)
    data: list[Any] = [cases()[i] for i in names or range(4)]
    # MONAI hashes what it can pickle: paths in a real run
    found: CaseCache = training_dataset(data, transform, settings)
    return found


SIZE = host_bytes(dataset(None)._cache[0]) / GB


def patches(data: CaseCache) -> torch.Tensor:
    set_determinism(seed=5)
    data.transform.set_random_state(seed=5)
    found = [torch.as_tensor(patch["image"]) for i in range(len(data)) for patch in data[i]]
    set_determinism(seed=None)
    return torch.stack(found)


@pytest.mark.parametrize(
    ("limit", "kept"), [(None, 4), (0.0, 0), (2.5 * SIZE, 2), (0.5 * SIZE, 0), (9 * SIZE, 4)]
)
@pytest.mark.parametrize("sampling", ["foreground", "balanced"])
def test_as_many_cases_stay_as_fit(limit: float | None, kept: int, sampling: str) -> None:
    """The patches are the same to the last bit, whatever is kept."""
    factor = 1.2 if sampling == "balanced" and limit else 1.0  # it keeps centres of patches too
    data = dataset(None if limit is None else limit * factor, sampling=sampling)
    assert len(data._cache) == data.cache_num == kept
    assert torch.equal(patches(data), patches(dataset(None, sampling=sampling)))


def test_the_log_has_what_is_read_again(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="volseg"):
        dataset(2.5 * SIZE)
    assert "2 of 4 training cases stay in memory" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="volseg"):
        dataset(None)
    assert not caplog.text


def test_the_default_is_half_of_the_allotted_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(case_cache, "allotted_memory", lambda: 3 * SIZE * GB)
    assert dataset(None).cache_num == 1


def test_bytes_are_those_of_tensors_and_arrays() -> None:
    """Wherever they are in a case."""
    item = {
        "image": torch.zeros(1, 3, 5, dtype=torch.float32),
        "label": [np.zeros(7, dtype=np.int16)],
        "centres": CentreVoxels(voxels={1: np.zeros(11, dtype=np.int32)}, counts={1: 11}),
        "case": "x",
    }
    assert host_bytes(item) == 60 + 14 + 44
