from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from monai.data import MetaTensor
from nibabel.eulerangles import euler2mat
from phantom import ORIENTATIONS, make_bundle, oblique, parse_spec, reorient, spec_content
from scipy import ndimage

from pipeline.bundle.opening import open_bundle
from pipeline.config.parser import parse_config
from pipeline.config.spec import Spec, spec_fingerprint
from pipeline.errors import ConfigError
from pipeline.inference import cascade
from pipeline.inference.aggregator import ScoreBlock
from pipeline.inference.cascade import (
    SLAB,
    CascadeNetwork,
    CoarseProbabilities,
    _box_image,
    _part_near,
    load_cascade,
    mean_position,
)
from pipeline.inference.decision_agreement import STEP, DecisionAgreement
from pipeline.inference.invert import InvertedLabels, LabelInversion
from pipeline.inference.predictor import predict_case
from pipeline.networks.factory import build_network
from pipeline.transforms.preprocess import IMAGE, SCAN, preprocessing
from pipeline.types import Affine

LABELS = {"background": 0, "shell": 7, "core": 3}
GREYS = (10.0, 60.0, 110.0)
SHAPE = (64, 52, 58)  # voxels of the scan
SPACING = (1.1, 1.4, 0.9)  # mm
CASCADE = {
    "structures": ["core"],
    "spacing": [1.0, 1.0, 1.0],
    "roi_size": [40, 48, 32],
    "network": {"features": [2, 3, 4]},
}


def cascade_spec(**changes: Any) -> Spec:
    content = spec_content(3, labels=LABELS, spacing=[3.0, 3.0, 3.0])
    return parse_config(Spec, content | {"cascade": CASCADE | changes}, "spec")


def truth_of() -> Any:
    """Return a core with a wavy border in a shell, (X, Y, Z) class numbers."""
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in SHAPE), indexing="ij")
    radius = np.sqrt(x**2 + 1.3 * y**2 + 0.8 * z**2)
    labels = (radius < 0.85).astype(np.uint8)
    labels[radius < 0.36 + 0.05 * np.sin(9 * x) * np.cos(8 * y + 5 * z)] = 2
    return labels


def coarse_logits(truth: Any, affine: Affine, image: MetaTensor) -> torch.Tensor:
    """Return the logits of a network that sees blurred structures, on the grid of an image."""
    matrix = np.linalg.inv(affine) @ image.affine.numpy()
    voxels = np.stack(np.meshgrid(*map(np.arange, image.shape[1:]), indexing="ij"))
    position = np.tensordot(matrix[:3, :3], voxels, axes=1) + matrix[:3, 3].reshape(3, 1, 1, 1)
    parts = []
    for number in range(3):
        blurred = ndimage.gaussian_filter((truth == number) * 1.0, 2.0)
        parts.append(ndimage.map_coordinates(blurred, position, order=1, mode="nearest"))
    return torch.from_numpy(np.log(np.clip(np.stack(parts), 1e-4, 1))).float()


def by_grey_value(image: torch.Tensor) -> torch.Tensor:
    """Stand in for a perfect second network: the class whose grey value is nearest."""
    greys = torch.tensor(GREYS) / GREYS[-1]
    # percentiles of the box stretch the grey values; shell and core are always in it
    low, high = image.amin(), image.amax()
    stretched = (image - low) / (high - low)
    expected = (greys - greys.min()) / (greys.max() - greys.min())
    return torch.cat([-80 * (stretched - grey).abs() for grey in expected], dim=1)


class Perfect(CascadeNetwork):
    """A cascade whose second network needs no weights."""

    def prepare(self) -> Any:
        return by_grey_value


def invert(
    orientation: str, cascade: CascadeNetwork | None, spec: Spec
) -> tuple[InvertedLabels, Any]:
    """Return the labels from coarse logits, and the true class numbers on the file's grid."""
    truth = truth_of()
    noise = np.random.default_rng(2).normal(0, 0.5, SHAPE)
    grey = (np.asarray(GREYS)[truth] + noise).astype(np.float32)
    scan = reorient(nib.Nifti1Image(grey, oblique(SPACING)), orientation)
    turned = np.asarray(
        reorient(nib.Nifti1Image(truth, oblique(SPACING)), orientation).dataobj, dtype=np.uint8
    )
    case = preprocessing(spec)({IMAGE: scan})
    logits = coarse_logits(turned, scan.affine, case[IMAGE])
    block = ScoreBlock(start=(0, 0, 0), scores=logits, shape=tuple(logits.shape[1:]))
    inversion = LabelInversion(spec, cascade=cascade)
    return inversion.from_blocks(iter([block]), case[IMAGE], case[SCAN]), turned


@pytest.mark.parametrize("orientation", ORIENTATIONS[::7])
def test_labels_in_the_box_follow_the_scan_and_others_stay(orientation: str) -> None:
    spec = cascade_spec()
    alone, truth = invert(orientation, None, spec)
    both, _ = invert(orientation, Perfect(spec, "."), spec)
    values = np.array(list(LABELS.values()), dtype=np.uint8)
    is_core = truth == 2
    # the core lies inside the box, where the second network's share is 1
    found, before = both.labels == LABELS["core"], alone.labels == LABELS["core"]
    assert overlap(found, is_core) > 0.97
    assert overlap(before, is_core) < 0.93
    # outside the box nothing changes: its farthest corner is nearer than this
    distance = ndimage.distance_transform_edt(
        ~is_core, np.linalg.norm(both.grid.affine[:3, :3], axis=0)
    )
    outside = distance > 40
    assert outside.any()
    assert np.array_equal(both.labels[outside], alone.labels[outside])
    assert set(np.unique(both.labels)) <= set(values.tolist())


def test_soft_volumes_are_those_of_both_networks_together() -> None:
    spec = cascade_spec()
    spec = replace(spec, soft_volumes=True)
    alone, truth = invert("RAS", None, spec)
    both, _ = invert("RAS", Perfect(spec, "."), spec)
    assert alone.soft_mm3 is not None and both.soft_mm3 is not None
    expected = (truth == 2).sum() * np.prod(SPACING)
    assert abs(both.soft_mm3[2] / expected - 1) < 0.02
    assert abs(alone.soft_mm3[2] / expected - 1) > abs(both.soft_mm3[2] / expected - 1)
    # probabilities of a voxel have the sum 1, before and after
    assert sum(both.soft_mm3) == pytest.approx(sum(alone.soft_mm3), rel=1e-4)


def test_a_share_averages_the_logarithms_of_both() -> None:
    spec = cascade_spec(share=0.3)
    coarse, scan = CoarseProbabilities(), MetaTensor(torch.rand(1, 50, 52, 60), affine=torch.eye(4))
    logits = torch.zeros(3, 50, 52, 60)
    logits[2, 20:30, 22:30, 25:36] = 2.0
    block = ScoreBlock(start=(0, 0, 0), scores=logits, shape=(50, 52, 60))
    list(coarse.pass_through(iter([block])))
    network = Perfect(spec, ".")
    found = network.fine_box(coarse, np.eye(4), scan)
    assert found is not None
    network.share = 1.0
    list(coarse.pass_through(iter([block])))
    second = network.fine_box(coarse, np.eye(4), scan)
    assert second is not None
    inner = (slice(None), *(slice(10, -10) for _ in range(3)))
    start = np.rint(found.affine[:3, 3]).astype(int) + 10
    stop = start + np.array(found.scores[inner].shape[1:])
    box = (slice(None), *(slice(a, b) for a, b in zip(start, stop, strict=True)))
    # the box lies between voxels of the first network's grid: its logits are interpolated, and
    # away from steps they are the same
    first = torch.log_softmax(logits, dim=0)[box]
    even = first[2, 3, 3, 3]
    assert float(even) < 0
    expected = 0.3 * second.scores[inner][:, 3, 3, 3] + 0.7 * first[:, 3, 3, 3]
    torch.testing.assert_close(found.scores[inner][:, 3, 3, 3], expected, atol=2e-3, rtol=0)


class Fixed(CascadeNetwork):
    """A cascade whose second network always returns the same scores."""

    scores: torch.Tensor

    def prepare(self) -> Any:
        return lambda image: self.scores[None].clone()


def test_the_agreement_of_both_networks_is_counted_in_the_box() -> None:
    """It is the Dice of their decisions, which a grid in step with the box shows exactly."""
    spec = cascade_spec(share=0.3)
    size = (50, 54, 60)
    # far apart: probabilities are kept in float16, where close ones would be equal
    chosen = torch.randint(2, size, generator=torch.Generator().manual_seed(1))
    logits = torch.stack([4.0 * (chosen == 0), 4.0 * (chosen == 1), torch.zeros(size)])
    logits[2, 20:30, 22:30, 25:35] = 9.0  # its centre puts the corner of the box at 5, 2, 14
    coarse = CoarseProbabilities()
    block = ScoreBlock(start=(0, 0, 0), scores=logits, shape=size)
    list(coarse.pass_through(iter([block])))
    network = Fixed(spec, ".")
    network.scores = torch.randn(3, 40, 48, 32, generator=torch.Generator().manual_seed(2))
    agreement = DecisionAgreement("softmax")
    scan = MetaTensor(torch.rand(1, *size), affine=torch.eye(4))
    found = network.fine_box(coarse, np.eye(4), scan, agreement)
    assert found is not None
    assert found.affine[:3, 3].tolist() == [5, 2, 14]
    one = logits[:, 5:45, 2:50, 14:46].argmax(0).numpy()
    two = network.scores.argmax(0).numpy()
    planes = [x for x in range(40) if x % SLAB % STEP == 0]
    for number in range(3):
        a, b = one[planes] == number, two[planes] == number
        assert agreement.dice[number] == pytest.approx(overlap(a, b))
        assert 0 < agreement.dice[number] < 1


def test_without_the_structures_the_first_network_stays_alone() -> None:
    spec = cascade_spec()
    coarse = CoarseProbabilities()
    logits = torch.zeros(3, 9, 8, 7)
    logits[0] = 10
    list(coarse.pass_through(iter([ScoreBlock(start=(0, 0, 0), scores=logits, shape=(9, 8, 7))])))
    scan = MetaTensor(torch.zeros(1, 20, 21, 22), affine=torch.from_numpy(oblique()))
    assert Perfect(spec, ".").fine_box(coarse, oblique(), scan) is None


def test_kept_probabilities_do_not_depend_on_the_blocks() -> None:
    logits = torch.randn(3, 10, 6, 7, generator=torch.Generator().manual_seed(0))
    whole, parts = CoarseProbabilities(), CoarseProbabilities()
    shape = tuple(logits.shape[1:])
    list(whole.pass_through(iter([ScoreBlock(start=(0, 0, 0), scores=logits, shape=shape)])))
    blocks = [
        ScoreBlock(start=(0, 0, 0), scores=logits[:, :6], shape=shape),
        ScoreBlock(start=(5, 0, 0), scores=logits[:, 5:], shape=shape),
    ]
    list(parts.pass_through(iter(blocks)))
    gathered, again = whole.gathered(), parts.gathered()
    assert gathered is not None and again is not None
    (maps, first), (same, same_first) = gathered, again
    assert first == same_first == (0, 0, 0)
    assert torch.equal(maps, same)
    assert whole.gathered() is None
    centre = mean_position(maps, [2])
    found = np.argwhere(torch.softmax(logits, dim=0)[2].half().numpy() > 0.5).mean(axis=0)
    assert centre is not None
    np.testing.assert_allclose(centre.numpy(), found)


def test_the_image_of_the_box_is_that_of_simpleitk() -> None:
    spec = cascade_spec().cascade_spec
    assert spec is not None
    smooth = ndimage.gaussian_filter(np.random.default_rng(1).normal(size=SHAPE), 3).astype("f4")
    affine = oblique((1.0, 1.0, 1.0))
    scan = MetaTensor(torch.from_numpy(smooth)[None], affine=torch.from_numpy(affine))
    box = affine.copy()  # the same axes; the box begins outside the scan
    box[:3, 3] = affine[:3, :3] @ [-4.3, 3.6, 31.2] + affine[:3, 3]
    ours = _box_image(scan, box, replace(spec, intensity=replace(spec.intensity, method="none")))
    flip = np.diag([-1.0, -1.0, 1.0])  # ITK's world is LPS
    image = sitk.GetImageFromArray(smooth.transpose(2, 1, 0))
    image.SetOrigin((flip @ affine[:3, 3]).tolist())
    image.SetDirection((flip @ affine[:3, :3]).ravel().tolist())
    theirs = sitk.Resample(
        image,
        list(spec.roi_size),
        sitk.Transform(),
        sitk.sitkLinear,
        (flip @ box[:3, 3]).tolist(),
        [1.0, 1.0, 1.0],
        (flip @ box[:3, :3]).ravel().tolist(),
        0.0,
    )
    expected = sitk.GetArrayFromImage(theirs).transpose(2, 1, 0)
    # SimpleITK gives 0 up to half a voxel before the edge, where we repeat it: compare inside
    inside = expected != 0
    assert 0.2 < inside.mean() < 0.9
    np.testing.assert_allclose(ours[0].numpy()[inside], expected[inside], atol=1e-5)
    assert not ours[0, :3].any()


@pytest.mark.parametrize("orientation", ORIENTATIONS[::9])
@pytest.mark.parametrize("turn", [0.0, 12.0])
@pytest.mark.parametrize("spacing", [(0.6, 0.4, 0.7), (1.1, 1.4, 0.9)])
def test_the_box_needs_only_a_part_of_the_scan(
    orientation: str, turn: float, spacing: tuple[float, float, float], monkeypatch: Any
) -> None:
    """Wherever the box lies, its image is the one that the whole scan gives."""
    spec = cascade_spec().cascade_spec
    assert spec is not None
    draw = np.random.default_rng(3)
    grey = draw.normal(size=(71, 83, 60)).astype("f4")
    image = reorient(nib.Nifti1Image(grey, oblique(spacing)), orientation)
    affine = torch.from_numpy(image.affine)
    scan = MetaTensor(torch.from_numpy(np.ascontiguousarray(image.dataobj))[None], affine=affine)
    axes = oblique((1.0, 1.0, 1.0))[:3, :3] @ euler2mat(np.radians(turn))
    sizes = []
    for voxel in ([30, 40, 30], [-3, 60, 8], [68, 5, 50], [500, 0, 0]):
        box = np.eye(4)
        box[:3, :3] = axes
        middle = (np.array(spec.roi_size) - 1) / 2
        centre = nib.affines.apply_affine(oblique(spacing), voxel)
        box[:3, 3] = centre - axes @ middle
        found = _box_image(scan, box, spec)
        sizes.append(_part_near(scan, box, spec.roi_size).numel())
        with monkeypatch.context() as patched:
            patched.setattr(cascade, "_part_near", lambda scan, *_: scan)
            expected = _box_image(scan, box, spec)
        np.testing.assert_allclose(found.numpy(), expected.numpy(), atol=2e-5)
    assert min(sizes) < scan.numel() / 2
    assert sizes[-1] == scan.numel()  # far away


def test_weights_are_checked_and_read_once(tmp_path: Path) -> None:
    spec = cascade_spec()
    network = load_cascade(spec, tmp_path)
    assert network is not None
    with pytest.raises(ConfigError, match=r"model_cascade\.pt: no such file"):
        network.prepare()
    (tmp_path / "models").mkdir()
    assert spec.cascade_spec is not None
    small = build_network(spec.cascade_spec).half()
    torch.save(small.state_dict(), tmp_path / "models" / "model_cascade.pt")
    assert network.prepare() is network.prepare()
    copied = pickle.loads(pickle.dumps(network))
    window = torch.randn(1, 1, *spec.cascade_spec.roi_size)
    assert torch.equal(copied.prepare()(window), network.prepare()(window))
    torch.save({"other": torch.zeros(3)}, tmp_path / "models" / "model_cascade.pt")
    with pytest.raises(ConfigError, match=r"does not fit spec\.cascade\.network"):
        network.on_device(torch.device("cpu")).prepare()
    assert load_cascade(parse_spec(3), tmp_path) is None


def test_a_bundle_with_a_cascade_opens_and_uses_it(tmp_path: Path) -> None:
    structures = {"background": 0, "front": 7, "back": 300}
    cascade = {**CASCADE, "structures": ["front"], "roi_size": [16, 12, 20]}
    root = make_bundle(tmp_path / "bundle", 3, labels=structures, cascade=cascade)
    spec = open_bundle(root, device="cpu").spec
    assert spec.cascade_spec is not None
    torch.manual_seed(3)
    second = build_network(spec.cascade_spec)
    torch.nn.init.normal_(second.output.weight)  # type: ignore[union-attr, arg-type]
    torch.save(second.state_dict(), root / "models" / "model_cascade.pt")
    image = nib.Nifti1Image(
        ndimage.gaussian_filter(np.random.default_rng(5).normal(size=(31, 28, 22)), 2), oblique()
    )
    model = open_bundle(root, device="cpu")
    both = predict_case(model, image)
    alone = predict_case(
        replace(model, inversion=LabelInversion(spec), preprocessing=model.preprocessing), image
    )
    assert both.labels.shape == image.shape
    assert not np.array_equal(both.labels, alone.labels)
    in_torch = open_bundle(root, device="cpu", runtime="torch", precision="float32")
    assert np.mean(predict_case(in_torch, image).labels != both.labels) < 0.05
    assert model.identity()["cascade_sha256"]
    assert not replace(model, inversion=LabelInversion(spec)).identity()["cascade_sha256"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"structures": []}, r"spec\.cascade\.structures: expected at least one"),
        ({"structures": ["hull"]}, r"spec\.cascade\.structures: expected names of structures"),
        ({"structures": ["background"]}, r"spec\.cascade\.structures: expected names of"),
        ({"roi_size": [41, 48, 32]}, r"spec\.cascade\.roi_size\[0\]: expected a multiple of"),
        ({"share": 0}, r"spec\.cascade\.share: expected 0 < share ≤ 1"),
        ({"spacing": [1.0, 0.0, 1.0]}, r"spec\.cascade\.spacing\[1\]: expected mm"),
    ],
)
def test_wrong_settings_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cascade_spec(**changes)


def test_a_spec_without_cascade_keeps_its_fingerprint() -> None:
    plain = parse_spec(3)
    assert spec_fingerprint(replace(plain, cascade=None)) == spec_fingerprint(plain)
    assert spec_fingerprint(cascade_spec()) != spec_fingerprint(
        replace(cascade_spec(), cascade=None)
    )


def overlap(a: Any, b: Any) -> float:
    """Return the Dice of two masks."""
    return 2 * float((a & b).sum()) / float(a.sum() + b.sum())


def test_blocks_in_a_part_of_the_volume_have_background_around_them() -> None:
    """One voxel, where the volume goes on; the box begins there."""
    logits = torch.randn(3, 6, 5, 7, generator=torch.Generator().manual_seed(0))
    coarse = CoarseProbabilities()
    block = ScoreBlock(start=(4, 0, 2), scores=logits, shape=(20, 9, 9))
    list(coarse.pass_through(iter([block])))
    gathered = coarse.gathered()
    assert gathered is not None
    maps, first = gathered
    assert first == (3, 0, 1)
    assert maps.shape == (3, 8, 6, 8)  # at the end of the last axis the volume ends too
    inside = maps[:, 1:7, :5, 1:8]
    torch.testing.assert_close(inside, torch.softmax(logits, dim=0).half(), atol=1e-3, rtol=0)
    assert float(maps[0].sum()) == pytest.approx(
        float(inside[0].sum()) + maps[0].numel() - inside[0].numel(), rel=1e-2
    )
