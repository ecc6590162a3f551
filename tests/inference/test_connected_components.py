from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from phantom import oblique, parse_spec
from scipy import ndimage

from pipeline.inference.connected_components import _clean, clean_components, component_rules

RULES: dict[str, dict[str, Any]] = {
    "all": {"largest_component": ["all"]},
    "each": {"largest_component": ["each"]},
    "all and small": {"largest_component": ["all"], "min_component_ml": {"front": 0.02}},
    "holes": {"fill_holes": ["front", "back"]},
}


def noisy_labels(place: tuple[int, int, int]) -> torch.Tensor:
    """Return two structures with islands and holes in a part of a volume, the rest background."""
    random = np.random.default_rng(5)
    inner = (13, 9, 11)
    fields = np.stack([ndimage.gaussian_filter(random.normal(size=inner), 1.1) for _ in range(3)])
    labels = np.zeros((21, 17, 14), dtype=np.uint8)
    box = tuple(slice(s, s + n) for s, n in zip(place, inner, strict=True))
    labels[box] = fields.argmax(axis=0)
    for number in (1, 2):
        inside = np.argwhere(ndimage.binary_erosion(labels == number))
        labels[tuple(inside[0])] = 0
    return torch.from_numpy(labels)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("place", [(4, 3, 2), (0, 8, 3), (8, 0, 0)], ids=str)
def test_the_box_of_the_structures_gives_the_labels_of_the_volume(
    name: str, place: tuple[int, int, int]
) -> None:
    """Whether the structures are inside the volume or reach its faces; the input stays."""
    spec, affine = parse_spec(3, **RULES[name]), oblique((0.9, 1.3, 2.1))
    index = noisy_labels(place)
    before = index.clone()
    rules = component_rules(spec, abs(float(np.linalg.det(affine[:3, :3]))))
    expected = _clean(index, rules, spec)
    found = clean_components(index, affine, spec)
    assert not torch.equal(found, before)
    assert torch.equal(found, expected)
    assert torch.equal(index, before)


def test_a_volume_without_structures_stays() -> None:
    """There is no box to look at."""
    empty = torch.zeros(5, 6, 7, dtype=torch.uint8)
    spec = parse_spec(3, **RULES["all and small"])
    assert torch.equal(clean_components(empty, np.eye(4), spec), empty)
