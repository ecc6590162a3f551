from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from monai.transforms.traits import RandomizableTrait
from monai.utils import set_determinism
from phantom import LABELS, RUN, nifti, parse_spec, smooth

from pipeline.config.parser import parse_config
from pipeline.config.run import Run
from pipeline.errors import ConfigError, VolumeError
from pipeline.transforms import patches as patches_module
from pipeline.transforms.patches import ClassIndexd, ToGpud, crop_size, training_transform
from pipeline.transforms.preprocess import preprocessing


def labelled_case() -> dict[str, Any]:
    """A volume whose label follows from its intensity: 7 above 120, 300 above 140."""
    array = smooth()
    label = np.select([array > 140, array > 120], [300, 7], 0).astype(np.int16)
    return {"case": "x", "image": nifti(array), "label": nifti(label)}


def patches(
    dims: int, *, run: dict[str, Any] | None = None, count: int = 8, **changes: Any
) -> list[dict[str, torch.Tensor]]:
    spec = parse_spec(dims, **changes)
    settings = parse_config(
        Run, RUN | {"batch_size": count, "patches_per_case": count} | (run or {}), "run"
    )
    set_determinism(seed=3)
    taken = training_transform(preprocessing(spec), spec, settings)(labelled_case())
    set_determinism(seed=None)
    return list(taken)


@pytest.mark.parametrize("dims", [2, 3])
def test_patches_are_what_the_network_takes(dims: int) -> None:
    """There are `patches_per_case`, of roi_size, in float32; labels are channel numbers 0 to 2."""
    taken = patches(dims, count=24)
    assert len(taken) == 24
    for patch in taken:
        assert (
            tuple(patch["image"].shape)
            == tuple(patch["label"].shape)
            == (1, *parse_spec(dims).roi_size)
        )
        assert patch["image"].dtype == torch.float32
        assert torch.isfinite(patch["image"]).all()
    assert {int(value) for patch in taken for value in np.unique(patch["label"])} == {0, 1, 2}


STILL = {
    "rotation": 0.0, "scaling": 0.0, "shift": 0.0, "noise_chance": 0.0,
    "blur_chance": 0.0, "intensity_chance": 0.0,
}  # fmt: skip
SHAPE_ONLY = {
    "noise_chance": 0.0,
    "blur_chance": 0.0,
    "intensity_chance": 0.0,
    "affine_chance": 1.0,
    "mirror": ["R", "A"],
}


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("augment", [SHAPE_ONLY, {"affine_chance": 1.0}], ids=["shape", "all"])
def test_image_and_label_move_together(dims: int, augment: dict[str, Any]) -> None:
    """After any rotation, scaling, shift and mirroring, bright voxels are the labelled ones."""
    still = STILL | {"affine_chance": 0.0}
    moved, before = (
        patches(dims, run={"augment": a}, count=24, spacing=[None] * 3) for a in (augment, still)
    )
    assert agreement(moved) > 0.8 * agreement(before) > 0.4
    assert abs(agreement([{**patch, "label": patch["label"].flip(1)} for patch in moved])) < 0.3


def agreement(taken: list[dict[str, torch.Tensor]]) -> float:
    """The median correlation of a patch's image with its label, where the image is not 0."""
    found = []
    for patch in taken:
        image, label = patch["image"].flatten(), patch["label"].flatten()
        found.append(torch.corrcoef(torch.stack([image[image != 0], label[image != 0]]))[0, 1])
    return float(torch.stack(found).nanmedian())


@pytest.mark.parametrize("dims", [2, 3])
def test_a_run_may_have_its_own_patch_size(dims: int) -> None:
    """Patches have the run's size; one that the network cannot process is refused."""
    size = [8, 12, 4][:dims]
    assert {
        tuple(patch["image"].shape) for patch in patches(dims, run={"patch_size": size}, count=2)
    } == {(1, *size)}
    for wrong, says in (
        ([7, 12, 4][:dims], "expected a multiple"),
        ([8] * (5 - dims), f"patch_size: expected {dims} numbers"),
    ):
        with pytest.raises(ConfigError, match=says):
            patches(dims, run={"patch_size": wrong}, count=2)


def test_nothing_random_leaves_the_volume_as_it_is() -> None:
    """With all chances at 0 a patch is a part of the preprocessed volume."""
    spec = parse_spec(3, spacing=[None] * 3)
    volume = preprocessing(spec)(labelled_case())["image"].as_tensor()
    (patch,) = patches(
        3, run={"augment": STILL | {"affine_chance": 0.0}}, count=1, spacing=[None] * 3
    )
    windows = volume[0]
    for axis, n in enumerate(spec.roi_size):
        windows = windows.unfold(axis, n, 1)
    assert (windows == patch["image"][0]).flatten(3).all(dim=-1).sum() == 1


@pytest.mark.parametrize("slice_axis", "RAS")
@pytest.mark.parametrize("orientation", ["RAS", "SPL"])
def test_2d_patches_are_slices_across_the_anatomical_axis(
    slice_axis: str, orientation: str
) -> None:
    """A patch of a 2D network is one voxel thick along the axis that slices are stacked along."""
    spec = parse_spec(2, slice_axis=slice_axis, orientation=orientation, roi_size=[8, 6])
    thin = crop_size(spec)
    assert thin[spec.slice_dim or 0] == 1
    case = labelled_case()
    volume = preprocessing(spec)(case)["image"].as_tensor()[0].movedim(spec.slice_dim or 0, 0)
    run = {"augment": STILL | {"affine_chance": 0.0}}
    windows = volume.unfold(1, 8, 1).unfold(2, 6, 1)
    for patch in patches(
        2, run=run, count=4, slice_axis=slice_axis, orientation=orientation, roi_size=[8, 6]
    ):
        assert (windows == patch["image"][0]).flatten(3).all(dim=-1).sum() == 1


@pytest.mark.parametrize("dims", [2, 3])
def test_the_mirror_is_anatomical(dims: int) -> None:
    """Mirroring along R reverses the left-right axis of any orientation, and no other axis."""
    changes: dict[str, Any] = {"orientation": "SRA", "spacing": [None] * 3}
    if dims == 2:
        changes["slice_axis"] = "S"
    run = {"augment": STILL | {"affine_chance": 0.0, "mirror": ["R"]}}
    spec = parse_spec(dims, **changes)
    volume = preprocessing(spec)(labelled_case())["image"].as_tensor()[0]
    axis = 1
    flipped = 0
    for patch in patches(dims, run=run, count=8, **changes):
        part = patch["image"] if dims == 3 else patch["image"][:, None]
        found = [_holds(candidate, part[0]) for candidate in (volume, volume.flip(axis))]
        assert any(found)
        flipped += not found[0]
    assert 0 < flipped < 8


def _holds(volume: torch.Tensor, part: torch.Tensor) -> bool:
    """Whether the inner voxels of a padded patch lie somewhere in a volume."""
    core = part[
        tuple(
            slice(n // 2, n // 2 + 1) if n < 4 else slice(n // 2 - 2, n // 2 + 2)
            for n in part.shape
        )
    ]
    windows = volume
    for axis, n in enumerate(core.shape):
        windows = windows.unfold(axis, n, 1)
    return bool((windows == core).flatten(3).all(dim=-1).any())


@pytest.mark.parametrize("network", [{}, {"padding": False}], ids=["padded", "unpadded"])
def test_caching_stops_where_random_transforms_start(network: dict[str, Any]) -> None:
    """The two parts give the patches of the whole, split where MONAI's CacheDataset splits."""
    size = {"roi_size": [20, 20, 20], "overlap": 0} if network else {}
    spec = parse_spec(3, network={"features": [2, 3], **network}, **size)
    settings = parse_config(Run, RUN | {"batch_size": 2, "patches_per_case": 2}, "run")
    transform = training_transform(preprocessing(spec), spec, settings)
    assert transform.first_random == transform.get_index_of_first(
        lambda step: isinstance(step, RandomizableTrait)
    )
    whole = transform.set_random_state(5)(labelled_case())
    parts = transform.set_random_state(5).random(transform.deterministic(labelled_case()))
    assert len(parts) == len(whole) == 2
    for a, b in zip(parts, whole, strict=True):
        assert torch.equal(a["image"], b["image"])
        assert torch.equal(a["label"], b["label"])


def test_the_same_seed_takes_the_same_patches() -> None:
    """Augmentation is random only by its seed."""
    for a, b in zip(patches(3), patches(3), strict=True):
        assert torch.equal(a["image"], b["image"])
        assert torch.equal(a["label"], b["label"])


def test_values_become_channel_numbers() -> None:
    """Channels follow the order of the spec's labels, whatever their values."""
    names = {"background": 0, "b": 300, "a": 7}
    case = preprocessing(parse_spec(3, spacing=[None] * 3))(labelled_case())
    index = ClassIndexd("label", names.values())({**case, "case": "x"})["label"]
    for number, value in enumerate(names.values()):
        assert ((case["label"] == value) == (index == number)).all()


def test_a_value_that_no_label_names_is_refused() -> None:
    """The message names the case and the values."""
    case = preprocessing(parse_spec(3))(labelled_case())
    with pytest.raises(VolumeError, match=r"x: label values 300, expected only \[0, 7\]"):
        ClassIndexd("label", [0, 7])(case)
    assert LABELS["back"] == 300


def test_cases_move_to_the_gpu_while_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two cases fit, the third stays on the host; a meta device stands in for the GPU."""
    room = iter([True, True, False])
    monkeypatch.setattr(patches_module, "fits_in_gpu_memory", lambda device: next(room))
    move = ToGpud(("image", "label"), torch.device("meta"))
    cases = [move({"case": str(i), "image": torch.zeros(1, 2, 3, 4)}) for i in range(3)]
    assert [case["image"].device.type for case in cases] == ["meta", "meta", "cpu"]
