"""Where patches are centred: by label, balanced or not, and never on ignored voxels."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.utils import set_determinism
from phantom import RUN, nifti, parse_spec, smooth

from pipeline.config.parser import parse_config
from pipeline.config.run import Run
from pipeline.errors import ConfigError
from pipeline.transforms.border_weights import BorderWeightd
from pipeline.transforms.patches import (
    CENTRES,
    MAX_CENTRES,
    CentreVoxels,
    ClassIndexd,
    RandCropByLabel,
    training_transform,
)
from pipeline.transforms.preprocess import preprocessing

SHAPE = (19, 23, 17)


def numbers_map(rare: int = 3) -> torch.Tensor:
    """Background, a large structure 1, a rare one 2 of some voxels, and ignored slices."""
    label = torch.zeros(1, *SHAPE)
    label[0, 4:12, 5:17, 3:9] = 1
    label[0, 14, 10, 2 : 2 + rare] = 2
    label[0, :, :, 10:] = -1
    return label


def centres(label: torch.Tensor, draws: int = 3000, **changes: Any) -> torch.Tensor:
    """Return the label at the centre of many patches of 1 voxel."""
    settings: dict[str, Any] = {"structure_share": 0.75, "balanced": False} | changes
    crop = RandCropByLabel(["label"], "label", (1, 1, 1), count=draws, **settings)
    crop.set_random_state(seed=4)
    patches = crop({"label": label, CENTRES: CentreVoxels.of(label[0]), "case": "x"})
    assert all(CENTRES not in patch for patch in patches)
    return torch.stack([patch["label"].flatten()[0] for patch in patches])


def shares(found: torch.Tensor) -> dict[int, float]:
    values, counts = np.unique(found.numpy(), return_counts=True)
    return {int(v): int(n) / len(found) for v, n in zip(values, counts, strict=True)}


def test_a_rare_structure_is_drawn_as_often_as_a_large_one() -> None:
    """3 of 579 structure voxels: 0.4 % of the patches become 37.5 %; ignored ones none."""
    by_voxel, balanced = (
        shares(centres(numbers_map())),
        shares(centres(numbers_map(), balanced=True)),
    )
    assert set(by_voxel) <= {0, 1, 2}
    assert by_voxel[1] == pytest.approx(0.746, abs=0.03)
    assert by_voxel.get(2, 0.0) < 0.02
    assert balanced == pytest.approx({0: 0.25, 1: 0.375, 2: 0.375}, abs=0.03)


def test_the_share_of_structures_is_the_runs() -> None:
    found = shares(centres(numbers_map(), structure_share=0.2))
    assert found[0] == pytest.approx(0.8, abs=0.03)


@pytest.mark.parametrize(("value", "expected"), [(0, 0), (1, 1), (-1, -1)])
def test_a_case_with_one_kind_of_voxels_gives_patches_of_it(value: int, expected: int) -> None:
    """Healthy controls have no structure; a case that nobody labelled still has patches."""
    label = torch.full((1, *SHAPE), float(value))
    assert set(shares(centres(label, draws=20))) == {expected}


def test_centres_are_all_voxels_up_to_a_limit() -> None:
    """By numpy, each voxel once; of more than the limit, evenly spread ones and the whole count."""
    found = CentreVoxels.of(numbers_map()[0])
    for number in (0, 1, 2):
        expected = np.flatnonzero(numbers_map().numpy().ravel() == number)
        np.testing.assert_array_equal(np.sort(found.voxels[number]), expected)
    large = CentreVoxels.of(torch.zeros(40, 41, 42))
    assert MAX_CENTRES / 2 < len(large.voxels[0]) <= MAX_CENTRES
    assert large.counts == {0: 40 * 41 * 42}
    assert np.abs(np.diff(large.voxels[0]) - 7).max() == 0


def test_patches_lie_within_the_volume_around_their_centre() -> None:
    """The centre is in the patch; sizes above the volume's are cut to it."""
    image = torch.arange(float(np.prod(SHAPE))).reshape(1, *SHAPE)
    crop = RandCropByLabel(
        ["image", "label"], "label", (8, 30, 5), count=50, structure_share=1.0, balanced=True
    )
    for patch in crop({"image": image, "label": numbers_map(2)}):
        assert tuple(patch["image"].shape) == (1, 8, 23, 5)
        assert bool((patch["label"] > 0).any())


def ignored_case(under: int) -> dict[str, Any]:
    """A volume with a structure, of which the upper half is ignored (value 9)."""
    array = smooth()
    label = np.where(array > 120, 7, 0).astype(np.uint8)
    label[..., 11:] = 9
    array[..., 11:] += under
    return {"case": "x", "image": nifti(array), "label": nifti(label)}


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("loss", ["dice_ce", "border_ce"])
def test_ignored_voxels_are_minus_one_in_patches(dims: int, loss: str) -> None:
    """Whatever type the label has; their weight is 0."""
    spec = parse_spec(dims, ignore_label=9, spacing=[None] * 3)
    run = RUN | {"batch_size": 40, "patches_per_case": 40, "loss": loss}
    set_determinism(seed=3)
    transform = training_transform(preprocessing(spec), spec, parse_config(Run, run, "run"))
    patches = list(transform(ignored_case(0)))
    set_determinism(seed=None)
    labels = torch.stack([patch["label"] for patch in patches])
    assert set(np.unique(labels.numpy()).tolist()) == {-1.0, 0.0, 1.0}
    if loss == "border_ce":
        weights = torch.stack([patch["weight"] for patch in patches])
        # interpolated weights at the border of the ignored voxels may be above 0
        assert float(weights[labels == -1].median()) == 0
        assert float(weights[labels >= 0].median()) > 0


def test_border_weights_do_not_see_ignored_voxels() -> None:
    """The labels below them change nothing: neither class weights nor borders."""
    label = numbers_map()
    weight = BorderWeightd("label", 10.0, 5.0)({"label": MetaTensor(label)})["weight"]
    assert not weight[label < 0].any()
    shown = label[..., :10]
    expected = BorderWeightd("label", 10.0, 5.0)({"label": MetaTensor(shown)})["weight"]
    torch.testing.assert_close(weight[..., :10].as_tensor(), expected.as_tensor())


def test_values_of_regions_become_their_positions() -> None:
    """Each value has a number, whichever regions it belongs to."""
    spec = parse_spec(
        labels={"background": 0, "whole": 7, "core": 300},
        output="regions",
        regions={"whole": [7, 2, 300], "core": [300]},
        ignore_label=9,
    )
    case: dict[Hashable, Any] = {
        "label": MetaTensor(torch.tensor([[0, 2, 7, 300, 9]])),
        "case": "x",
    }
    found = ClassIndexd("label", spec.target_values, spec.ignore_label)(case)["label"]
    assert found.flatten().tolist() == [0, 1, 2, 3, -1]


def test_synthesis_has_no_regions() -> None:
    spec = parse_spec(ignore_label=9)
    run = parse_config(Run, RUN | {"synthesis": {"table": "t.csv"}}, "run")
    with pytest.raises(ConfigError, match=r"run.synthesis: expected a spec with output softmax"):
        training_transform(preprocessing(spec), spec, run)
