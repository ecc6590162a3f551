"""Regions that overlap: painted in order, measured as unions, cleaned by their own rules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from monai.data import MetaTensor
from phantom import make_bundle, nifti, oblique, parse_spec, save
from scipy import ndimage
from scipy.ndimage import map_coordinates
from scipy.special import expit

from pipeline.bundle import open_bundle
from pipeline.cli.app import main
from pipeline.inference import WindowInferer, clean_components, predict_case
from pipeline.inference.aggregator import ScoreBlock
from pipeline.inference.invert import LabelInversion
from pipeline.inference.label_resampling import labels_of_blocks
from pipeline.inference.model import Model
from pipeline.inference.probabilities import entropy
from pipeline.inference.test_time_augmentation import RotationInferer
from pipeline.inference.volumes import structure_volumes
from pipeline.transforms.preprocess import IMAGE
from pipeline.types import Affine, Array

# in the order of painting; `core` is not inside `edge`, and neither painting value is its number
LABELS = {"background": 0, "whole": 7, "edge": 5, "core": 300}
REGIONS = {"whole": [7, 5, 300], "edge": [5], "core": [300]}
CHANGES: dict[str, Any] = {"labels": LABELS, "output": "regions", "regions": REGIONS}

TURNED, SHEARED = oblique((1.2, 1.1, 1.6), angles=(-4.0, 8.0, 21.0)), oblique()
SHEARED[:3, 1] += 0.006 * SHEARED[:3, 0]
GRIDS = {
    "same": np.eye(4),
    "finer": np.array([[0.6, 0, 0, 0.2], [0, 0.4, 0, -0.3], [0, 0, 1.1, 1.5], [0, 0, 0, 1]]),
    "permuted": np.array([[0, 0.7, 0, 0.0], [0, 0, -0.9, 20.0], [1.3, 0, 0, -2.0], [0, 0, 0, 1]]),
    "turned": np.linalg.inv(oblique()) @ TURNED,
    "sheared": np.linalg.inv(oblique()) @ SHEARED,
}


def scores(shape: tuple[int, ...], classes: int = 3) -> torch.Tensor:
    """Smooth logits with borders between voxels."""
    random = np.random.default_rng(3)
    fields = [ndimage.gaussian_filter(random.normal(size=shape), 2.5) * 40 for _ in range(classes)]
    return torch.from_numpy(np.stack(fields).astype(np.float32))


def painted(probabilities: Array, values: tuple[int, ...] = (7, 5, 300)) -> Array:
    """Label map as nnU-Net makes it: `convert_probabilities_to_segmentation` of its label manager.

    With regions_class_order = values: for i, c in enumerate(order): segmentation[p[i] > 0.5] = c.
    """
    segmentation = np.zeros(probabilities.shape[1:], dtype=np.uint16)
    for i, c in enumerate(values):
        segmentation[probabilities[i] > 0.5] = c
    return segmentation


def on_grid(fields: Array, matrix: Affine, shape: tuple[int, ...]) -> Array:
    """Fields (C, x, y, z) at the voxels of another grid, by scipy's linear interpolation."""
    voxels = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), axis=-1)
    position = np.moveaxis(voxels @ matrix[:3, :3].T + matrix[:3, 3], -1, 0)
    found = [map_coordinates(field, position, order=1, mode="nearest") for field in fields]
    return np.stack(found)


@pytest.mark.parametrize("grid", GRIDS)
def test_painting_equals_nnunets(grid: str) -> None:
    """On the network's grid and on others; the whole volume at once, and cut into blocks."""
    shape, target_shape = (13, 17, 11), (19, 23, 15)
    logits = torch.cat([torch.zeros(1, *shape), scores(shape) - 2])
    probabilities = expit(logits[1:].numpy().astype(np.float64))
    expected = painted(on_grid(probabilities, GRIDS[grid], target_shape), (1, 2, 3))
    assert len(np.unique(expected)) >= 3
    whole = [ScoreBlock(start=(0, 0, 0), scores=logits.clone(), shape=shape)]
    halves = [
        ScoreBlock(start=(0, 0, 0), scores=logits[:, :7].clone(), shape=shape),
        ScoreBlock(start=(6, 0, 0), scores=logits[:, 6:].clone(), shape=shape),
    ]
    for blocks in (whole, halves):
        found = labels_of_blocks(
            iter(blocks), np.eye(4), GRIDS[grid], target_shape, output="regions"
        ).numpy()
        assert (found == expected).mean() >= 0.9999


@pytest.mark.parametrize("spacing", [None, 0.9], ids=["own", "other spacing"])
@pytest.mark.parametrize("held", [2**30, 1], ids=["one group", "small groups"])
def test_a_case_is_painted_on_its_own_grid(
    spacing: float | None, held: float, tmp_path: Path
) -> None:
    """From the network's logits to the label map, streamed or not; with its probabilities."""
    bundle = make_bundle(tmp_path / "b", overlap=0.25, soft_volumes=True, **CHANGES)
    model = open_bundle(bundle, device="cpu", runtime="torch", labels_spacing=spacing)
    model.inversion.probabilities = True
    assert isinstance(model.inferer, WindowInferer)
    model.inferer.buffer_bytes = held
    found = predict_case(model, nifti())
    volume = model.preprocessing({IMAGE: nifti()})[IMAGE]
    logits = model.inferer(volume[None].as_tensor(), model.network)[0].numpy()
    assert len(logits) == 4
    assert not logits[0].any()
    own = np.asarray(volume.affine, dtype=np.float64)
    probabilities = expit(logits[1:].astype(np.float64))
    fields = on_grid(probabilities, np.linalg.inv(own) @ found.affine, found.labels.shape)
    expected = painted(fields)
    assert len(np.unique(expected)) >= 3
    # positions within a thousandth of a voxel are moved onto it: a probability changes by that much
    undecided = (np.abs(fields - 0.5) < 0.005).any(axis=0)
    assert undecided.mean() < 0.05
    np.testing.assert_array_equal(found.labels[~undecided], expected[~undecided])
    assert found.probabilities is not None
    np.testing.assert_allclose(found.probabilities / 255, fields, atol=0.005 + 0.51 / 255)
    voxel = abs(np.linalg.det(own[:3, :3]))
    assert list(found.volumes_mm3) == ["whole", "edge", "core"]
    np.testing.assert_allclose(
        list(found.volumes_mm3.values()), probabilities.sum((1, 2, 3)) * voxel, rtol=1e-4
    )


def test_probabilities_of_a_softmax_sum_to_one(tmp_path: Path) -> None:
    """One map per label, the background's too; the label map is the same as without them."""
    bundle = make_bundle(tmp_path / "b", overlap=0.25)
    model = open_bundle(bundle, device="cpu", runtime="torch")
    plain = predict_case(model, nifti())
    assert plain.probabilities is None
    model.inversion.probabilities = True
    found = predict_case(model, nifti())
    np.testing.assert_array_equal(found.labels, plain.labels)
    assert found.probabilities is not None
    assert found.probabilities.shape == (3, *plain.labels.shape)
    total = found.probabilities.astype(int).sum(axis=0)
    assert total.min() >= 253
    assert total.max() <= 257
    best = np.array([0, 7, 300])[found.probabilities.argmax(axis=0)]
    assert (best == plain.labels).mean() > 0.99  # ties of rounded probabilities


def test_windows_without_foreground_paint_nothing(tmp_path: Path) -> None:
    """They are skipped, and the background's logit of 20 stands for them."""
    bundle = make_bundle(tmp_path / "b", overlap=0.0, foreground_threshold=0.3, **CHANGES)
    model = open_bundle(bundle, device="cpu", runtime="torch")
    # every region, where the network is computed
    torch.nn.init.constant_(model.network.get_parameter("network.output.bias"), 30.0)
    array = np.zeros((40, 44, 30), dtype=np.float32)
    array[:12, :12, :10] = np.random.default_rng(0).uniform(50, 100, size=(12, 12, 10))
    labels = predict_case(model, nifti(array)).labels
    assert labels[:8, :8, :8].all()
    assert not labels[25:].any()


def test_rotations_average_the_regions_probabilities() -> None:
    """Two versions half a turn apart, of a network that looks at single voxels: no change."""
    image = MetaTensor(torch.randn(1, 2, 9, 8, 7), affine=torch.eye(4))
    fields = torch.randn(3, 2)

    def network(x: torch.Tensor) -> torch.Tensor:
        logits = torch.einsum("ij,bjxyz->bixyz", fields, x)
        return torch.cat([torch.zeros_like(logits[:, :1]), logits], dim=1)

    class Plain:
        def __call__(self, x: torch.Tensor, net: Any) -> torch.Tensor:
            return torch.as_tensor(net(x))

    turned = RotationInferer(Plain(), 2, 2, regions=True)
    result = turned(image, network)
    torch.testing.assert_close(result, network(image.as_tensor()), atol=1e-3, rtol=1e-3)


def test_the_entropy_of_regions_is_that_of_each_for_itself() -> None:
    """Certain, half uncertain, and as uncertain as can be."""
    logit = torch.tensor([[40.0, 0.0, 0.0], [-40.0, 40.0, 0.0]]).reshape(2, 3, 1, 1)
    field = entropy(torch.cat([torch.zeros(1, 3, 1, 1), logit]), regions=True)
    assert field.flatten().tolist() == pytest.approx([0.0, 0.5, 1.0])


def test_volumes_are_those_of_the_union_of_values() -> None:
    """Nested regions count their voxels in each; a sum counts a voxel once."""
    spec = parse_spec(
        **CHANGES, sums={"tumour": ("all",), "parts": ("edge", "core"), "both": ("whole", "core")}
    )
    labels = np.array([0, 0, 7, 5, 5, 300, 300, 300], dtype=np.uint16).reshape(2, 2, 2)
    affine = np.diag([2.0, 1.0, 3.0, 1.0])
    assert structure_volumes(labels, affine, spec) == {
        "whole": 36.0,
        "edge": 12.0,
        "core": 18.0,
        "tumour": 36.0,
        "parts": 30.0,
        "both": 36.0,
    }


def regions_map(rows: list[list[int]]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.uint8)[:, :, None]


def test_a_smaller_component_becomes_the_region_below() -> None:
    """A core's island lies in the whole; an island of the whole goes with all that is in it."""
    spec = parse_spec(**CHANGES, largest_component=("whole", "core"))
    before = regions_map(
        [[0, 1, 1, 1, 1, 0, 0, 0], [0, 1, 3, 1, 3, 0, 2, 3], [0, 1, 3, 1, 1, 0, 1, 0]]
    )
    after = regions_map(
        [[0, 1, 1, 1, 1, 0, 0, 0], [0, 1, 3, 1, 1, 0, 0, 0], [0, 1, 3, 1, 1, 0, 0, 0]]
    )
    assert torch.equal(clean_components(before, np.eye(4), spec), after)


def test_a_hole_of_a_region_was_painted_before_it() -> None:
    """A hole in the core holds the whole, which is not lost: it contains the core."""
    spec = parse_spec(**CHANGES, fill_holes=("core",))
    before = regions_map([[0, 3, 3, 3, 0], [1, 3, 1, 3, 1], [0, 3, 3, 3, 0]]).permute(2, 0, 1)
    volume = before.repeat(3, 1, 1)
    volume[[0, 2]] = torch.where(volume[[0, 2]] > 0, 3, 0).to(torch.uint8)
    filled = clean_components(volume, np.eye(4), spec)
    assert filled[1, 1].tolist() == [1, 3, 3, 3, 1]


@pytest.mark.parametrize("smallest_ml", [0.005, 0.05])
def test_small_components_are_removed_by_their_volume(smallest_ml: float) -> None:
    """By scipy's own labelling, in mL whatever the spacing."""
    spec = parse_spec(min_component_ml={"front": smallest_ml})
    noise = ndimage.gaussian_filter(np.random.default_rng(4).normal(size=(19, 23, 17)), 1.5)
    index = (noise > np.quantile(noise, 0.8)).astype(np.uint8)
    affine = oblique((0.9, 1.3, 2.0))
    components, count = ndimage.label(index)
    sizes = ndimage.sum_labels(index, components, range(1, count + 1)) * 0.9 * 1.3 * 2.0 / 1000
    expected = np.isin(components, 1 + np.flatnonzero(sizes >= smallest_ml))
    found = clean_components(torch.from_numpy(index), affine, spec).numpy()
    assert 0 < expected.sum() < index.sum()
    np.testing.assert_array_equal(found > 0, expected)


def test_holes_of_a_structure_are_filled_where_they_are_background() -> None:
    """Another structure inside stays, as the ventricles do in white matter."""
    volume = torch.zeros(7, 9, 8, dtype=torch.uint8)
    volume[1:6, 1:8, 1:7] = 1
    volume[2, 2, 2], volume[4, 5, 5] = 0, 2
    found = clean_components(volume, np.eye(4), parse_spec(fill_holes=("each",)))
    assert found[2, 2, 2] == 1
    assert found[4, 5, 5] == 2
    assert found[0].sum() == 0


def test_a_region_bundle_runs_by_every_road(tmp_path: Path) -> None:
    """`bundle check`, the command line and MONAI's evaluator; the metadata name the regions."""
    bundle = make_bundle(tmp_path / "regions", overlap=0.25, **CHANGES)
    scan = save(tmp_path / "scan.nii.gz")
    checked = CliRunner().invoke(main, ["bundle", "check", str(bundle)])
    assert checked.exit_code == 0, checked.output
    arguments = ["segment", str(scan), "-o", str(tmp_path / "out"), "-b", str(bundle)]
    done = CliRunner().invoke(main, [*arguments, "--device", "cpu"])
    assert done.exit_code == 0, done.output
    model: Model = open_bundle(bundle, device="cpu", runtime="torch")
    image = model.preprocessing({IMAGE: nifti()})[IMAGE]
    logits = model.inferer(image[None].as_tensor(), model.network)[0]
    by_monai = LabelInversion(model.spec)({"pred": logits, IMAGE: image})["pred"][0]
    np.testing.assert_array_equal(by_monai.numpy(), predict_case(model, nifti()).labels)
