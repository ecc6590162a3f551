from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Invertd
from phantom import SHAPE, nifti, oblique, reorient, smooth, spec_content
from scipy.ndimage import gaussian_filter, map_coordinates

from pipeline.config.parser import parse_config
from pipeline.config.spec import Spec
from pipeline.inference.aggregator import ScoreBlock
from pipeline.inference.invert import LabelInversion
from pipeline.inference.label_resampling import _sample_field, _sample_positions, labels_of_blocks
from pipeline.transforms.preprocess import preprocessing
from pipeline.transforms.resampling import axis_samplings, parallel_axes, sample_axes
from pipeline.types import Affine, Array

SHEARED = oblique()
SHEARED[:3, 1] += 0.006 * SHEARED[:3, 0]
TURNED = oblique((1.2, 1.1, 1.6), angles=(-4.0, 8.0, 21.0))


def parse(**changes: Any) -> Spec:
    return parse_config(Spec, spec_content(3, **changes), "spec")


def scores(shape: tuple[int, ...], classes: int = 3) -> torch.Tensor:
    """Smooth logits: regions of each class with borders between voxels."""
    random = np.random.default_rng(3)
    fields = [gaussian_filter(random.normal(size=shape), 2.5) * 40 for _ in range(classes)]
    return torch.from_numpy(np.stack(fields).astype(np.float32))


def sample_parallel(field: torch.Tensor, matrix: Affine, shape: tuple[int, ...]) -> torch.Tensor:
    axes = parallel_axes(matrix, shape)
    assert axes is not None
    return sample_axes(field, axis_samplings(matrix, axes, shape, field.shape, snap=0.001))


def sample_any(field: torch.Tensor, matrix: Affine, shape: tuple[int, ...]) -> torch.Tensor:
    whole = ScoreBlock(start=(0, 0, 0), scores=field[None], shape=tuple(field.shape))
    grid, mine = _sample_positions(tuple(slice(0, n) for n in shape), whole, matrix)
    assert mine.all()
    return _sample_field(field, grid)


def labels_on_grid(
    logits: torch.Tensor, affine: Affine, target_affine: Affine, shape: tuple[int, ...]
) -> torch.Tensor:
    whole = ScoreBlock(start=(0, 0, 0), scores=logits.clone(), shape=tuple(logits.shape[1:]))
    return labels_of_blocks(iter([whole]), affine, target_affine, shape)


def by_scipy(field: Array, matrix: Affine, shape: tuple[int, ...]) -> Array:
    voxels = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), axis=-1)
    position = np.moveaxis(voxels @ matrix[:3, :3].T + matrix[:3, 3], -1, 0)
    return np.asarray(map_coordinates(field.astype(np.float64), position, order=1, mode="nearest"))


@pytest.mark.parametrize("axcodes", ["RAS", "LPI", "SRA"])
@pytest.mark.parametrize(
    "affine", [oblique(), oblique((0.9, 0.9, 4.0)), SHEARED], ids=["oblique", "thick", "sheared"]
)
def test_equals_monais_inverse_of_soft_scores(axcodes: str, affine: Affine) -> None:
    """Softmax, Invertd with linear interpolation, argmax.

    The same label on at least .9999 of the voxels.
    """
    forward = preprocessing(parse())
    case: dict[Any, Any] = forward({"image": reorient(nifti(affine=affine), axcodes)})
    logits = scores(tuple(case["image"].shape[1:]))
    case["pred"] = MetaTensor(
        torch.softmax(logits, 0),
        meta=case["image"].meta,
        applied_operations=case["image"].applied_operations,
    )
    soft = Invertd("pred", forward, orig_keys="image", nearest_interp=False, to_tensor=True)(
        dict(case)
    )["pred"]
    expected = np.array([0, 7, 300])[np.asarray(soft.argmax(0))]
    case["pred"] = MetaTensor(logits, meta=case["image"].meta)
    ours = np.asarray(LabelInversion(parse())(case)["pred"][0])
    assert ours.shape == expected.shape
    assert len(np.unique(ours)) == 3
    assert (ours == expected).mean() >= 0.9999


GRIDS = {
    "same": np.eye(4),
    "finer": np.array([[0.6, 0, 0, 0.2], [0, 0.4, 0, -0.3], [0, 0, 1.1, 1.5], [0, 0, 0, 1]]),
    "permuted": np.array([[0, 0.7, 0, 0.0], [0, 0, -0.9, 20.0], [1.3, 0, 0, -2.0], [0, 0, 0, 1]]),
    "turned": np.linalg.inv(oblique()) @ TURNED,
    "sheared": np.linalg.inv(oblique()) @ SHEARED,
}


@pytest.mark.parametrize("name", GRIDS)
def test_equals_scipys_interpolation(name: str) -> None:
    """At every voxel, on grids parallel, permuted, turned and sheared, reaching beyond the edge."""
    field, shape = smooth(), (19, 14, 23)
    parallel = parallel_axes(GRIDS[name], shape) is not None
    assert parallel == (name in ("same", "finer", "permuted"))
    take = sample_parallel if parallel else sample_any
    ours = take(torch.from_numpy(field), GRIDS[name], shape)
    np.testing.assert_allclose(
        np.asarray(ours), by_scipy(field, GRIDS[name], shape), atol=0.02, rtol=1e-4
    )


@pytest.mark.parametrize("name", ["same", "finer", "permuted"])
@pytest.mark.parametrize("size", [SHAPE, (1, 24, 21), (17, 1, 1)])
def test_the_short_way_equals_the_long_one(name: str, size: tuple[int, int, int]) -> None:
    """One axis at a time is the same interpolation, also in volumes one voxel thick."""
    field, shape = torch.from_numpy(smooth(size)), (19, 14, 23)
    short, long = (take(field, GRIDS[name], shape) for take in (sample_parallel, sample_any))
    torch.testing.assert_close(short, long, atol=0.02, rtol=1e-4)


@pytest.mark.parametrize("target", [oblique((0.7, 1.0, 3.0)), TURNED], ids=["parallel", "turned"])
def test_labels_are_the_argmax_of_interpolated_probabilities(target: Affine) -> None:
    """Class by class with a running maximum is the argmax of all classes at once.

    The first of equals wins.
    """
    logits, shape = scores(SHAPE, 5), (15, 22, 13)
    matrix = np.linalg.inv(oblique()) @ target
    probabilities = torch.softmax(logits, dim=0).numpy()
    expected = np.stack([by_scipy(field, matrix, shape) for field in probabilities]).argmax(axis=0)
    ours = labels_on_grid(logits, oblique(), target, shape)
    assert ours.dtype == torch.uint8
    assert (np.asarray(ours) == expected).mean() >= 0.9999
    assert not labels_on_grid(torch.ones(4, *SHAPE), oblique(), target, shape).any()


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([0, 1, 2], np.uint8),
        ([0, 255, 3], np.uint8),
        ([0, 256, 3], np.uint16),
        ([0, 65535, 2], np.uint16),
        ([0, 70000, 2**32 - 1], np.uint32),
    ],
)
def test_values_are_the_specs_in_the_smallest_unsigned_type(values: list[int], dtype: type) -> None:
    """Channel numbers become output values, whatever their order and size."""
    spec = parse(
        labels=dict(zip(("background", "a", "b"), values, strict=True)), spacing=[None] * 3
    )
    case: dict[Any, Any] = preprocessing(spec)({"image": nifti()})
    logits = scores(SHAPE)
    case["pred"] = MetaTensor(logits, meta=case["image"].meta)
    ours = LabelInversion(spec)(case)["pred"][0].numpy()
    assert ours.dtype == dtype
    np.testing.assert_array_equal(
        ours, np.array(values, dtype=np.int64)[np.asarray(logits.argmax(0))]
    )


@pytest.mark.parametrize("name", ["finer", "permuted"])
@pytest.mark.parametrize("values", [300, 5000])
def test_pieces_give_the_labels_of_the_whole(
    name: str, values: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Boxes of single classes in small pieces give the argmax of all classes everywhere."""
    logits, shape = scores(SHAPE, 9) / 10, (19, 14, 23)
    fields = [sample_parallel(p, GRIDS[name], shape) for p in torch.softmax(logits, dim=0)]
    expected = torch.stack(fields).argmax(dim=0)
    monkeypatch.setattr("pipeline.inference.label_resampling.PIECE_VALUES", values)
    ours = labels_on_grid(logits, np.eye(4), GRIDS[name], shape)
    assert len(np.unique(expected)) == 9
    assert torch.equal(ours.long(), expected)


def test_a_class_can_win_between_voxels_in_which_it_does_not() -> None:
    """0.4 between 0.6 and 0 of one class, and 0 and 0.6 of another one."""
    probabilities = torch.tensor([[0.6, 0.0], [0.4, 0.4], [0.0, 0.6]])
    logits = (probabilities + 1e-6).log()[:, :, None, None]
    between = np.diag([0.25, 1.0, 1.0, 1.0])
    index = labels_on_grid(logits, np.eye(4), between, (5, 1, 1))
    assert index.flatten().tolist() == [0, 0, 1, 2, 2]


def test_many_classes() -> None:
    """More than 256 channels do not wrap around."""
    logits = torch.zeros(300, 3, 4, 5)
    logits[299, 1, 2, 3] = 1
    index = labels_on_grid(logits, np.eye(4), np.eye(4), (3, 4, 5))
    assert int(index[1, 2, 3]) == 299
