"""Features of the predicted Dice: they change nothing, and do not depend on how blocks are cut."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import log

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from phantom import SHAPE, make_model, nifti, oblique, parse_spec, smooth
from scipy.stats import entropy as scipy_entropy

from pipeline.config.spec import Spec
from pipeline.inference.aggregator import ScoreBlock
from pipeline.inference.case_model import Prediction
from pipeline.inference.decision_agreement import DecisionAgreement
from pipeline.inference.predictor import predict_case
from pipeline.inference.quality_features import (
    LABEL_FEATURES,
    QualityCollector,
    quality_features,
    stored_features,
)
from pipeline.networks import build_unet

SIDES = {"background": 0, "left part": 2, "right part": 5, "middle": 9}


def network(spec: Spec) -> torch.nn.Module:
    torch.manual_seed(3)
    net = build_unet(spec)
    torch.nn.init.normal_(net.output.weight)
    return net.eval()


def prediction(spec: Spec, *, keep: bool, shape: tuple[int, ...] = SHAPE) -> Prediction:
    model = replace(make_model(network(spec), spec), keep_quality_features=keep)
    return predict_case(model, nifti(smooth(shape)))


SPECS = {
    "3D": parse_spec(3, labels=SIDES, tta_mirror=["R"], soft_volumes=True),
    "2D": parse_spec(2, labels=SIDES),
    "sigmoid": parse_spec(3, labels=SIDES, output="sigmoid", tta_mirror=["R"]),
    "regions": parse_spec(
        3,
        labels=SIDES,
        output="regions",
        regions={"left part": [2, 5, 9], "right part": [5], "middle": [9, 2]},
        tta_mirror=["A"],
    ),
    "ensemble": parse_spec(
        3, labels=SIDES, network={"features": [4, 6], "norm": "instance", "ensemble": 2}
    ),
    "rotations": parse_spec(2, labels=SIDES, tta_rotations=2),
    "overlap_tile": parse_spec(
        2,
        labels=SIDES,
        overlap=0,
        roi_size=[28, 28],
        network={"features": [4, 6], "padding": False},
    ),
}


@pytest.mark.parametrize("name", SPECS)
def test_no_label_changes(name: str) -> None:
    """Labels, volumes and warnings are the same with and without features; the features known."""
    spec = SPECS[name]
    plain, kept = prediction(spec, keep=False), prediction(spec, keep=True)
    assert np.array_equal(plain.labels, kept.labels)
    assert plain.labels.dtype == kept.labels.dtype
    assert plain.volumes_mm3 == kept.volumes_mm3
    assert plain.warnings == kept.warnings
    assert plain.quality_features is None
    features = kept.quality_features
    assert features is not None
    present = [n for n, values in spec.values_of.items() if np.isin(kept.labels, values).any()]
    assert list(features.labels) == present
    for row in features.labels.values():
        assert 0 <= row["entropy"] <= 1
        assert np.isnan(row["border_entropy"]) or 0 <= row["border_entropy"] <= 1
        assert 0 < row["confidence"] <= 1
        assert np.isnan(row["mirror_dice"]) == (not spec.tta_mirror)
    assert stored_features(features.columns()).columns() == features.columns()


def blocks_of(scores: torch.Tensor, cuts: list[int], axis: int = 1) -> Iterator[ScoreBlock]:
    """Logits cut along an axis, each block with one voxel of the one before it."""
    shape = tuple(scores.shape[1:])
    for first, stop in zip([0, *cuts], [*cuts, shape[axis]], strict=True):
        begin = max(0, first - 1)
        start = tuple(begin if i == axis else 0 for i in range(3))
        part = scores.narrow(axis + 1, begin, stop - begin)
        yield ScoreBlock(start=start, scores=part, shape=shape)


@pytest.mark.parametrize("step", [1, 2, 3])
@pytest.mark.parametrize("output", ["softmax", "regions"])
def test_blocks_do_not_matter(output: str, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sums are those of one block, however it is cut and however thin the slabs are."""
    spec = SPECS["regions" if output == "regions" else "3D"]
    scores = torch.from_numpy(np.stack([smooth(seed=i) for i in range(4)])) / 60
    image = torch.from_numpy(smooth(seed=9))[None]
    found = []
    one_plane = 4 * 24 * 21
    monkeypatch.setattr("pipeline.inference.quality_features.VALUES_PER_STEP", 1)
    monkeypatch.setattr("pipeline.inference.quality_features.LARGEST_PLANE_STEP", step)
    for axis, cuts, slab in (
        (0, [], 10**9),
        (0, [2, 3, 9, 13], 10**9),
        (1, [5, 6, 20], 10**9),
        (2, [11], one_plane * 2),
        (0, [5], 1),
    ):
        monkeypatch.setattr("pipeline.inference.quality_features.SLAB_VALUES", slab)
        collector = QualityCollector(image, spec)
        assert all(
            block is not None for block in collector.pass_through(blocks_of(scores, cuts, axis))
        )
        found.append(collector.sums)
    for other in found[1:]:
        for name in found[0].__dataclass_fields__:
            np.testing.assert_allclose(
                getattr(found[0], name), getattr(other, name), rtol=1e-5, err_msg=name
            )
    assert found[0].voxels[1:].all()


def test_sums_are_those_of_the_formulas() -> None:
    """Entropy is scipy's; faces are counted voxel by voxel."""
    spec = SPECS["3D"]
    scores = torch.from_numpy(np.stack([smooth((4, 5, 3), seed=i) for i in range(4)])) / 60
    image = torch.from_numpy(smooth((4, 5, 3), seed=9))[None]
    collector = QualityCollector(image, spec)
    list(collector.pass_through(blocks_of(scores, [2])))
    probability = torch.softmax(scores.double(), dim=0).numpy()
    index = probability.argmax(axis=0)
    entropy = scipy_entropy(probability, axis=0) / log(4)
    faces, steps = np.zeros(4), np.zeros(4)
    for place in np.ndindex(4, 5, 3):
        for axis in (1, 2):  # within planes
            other = tuple(n + (i == axis) for i, n in enumerate(place))
            if other[axis] < index.shape[axis] and index[place] != index[other]:
                for number in (index[place], index[other]):
                    faces[number] += 1
                    steps[number] += abs(float(image[0][place] - image[0][other]))
    sums = collector.sums
    np.testing.assert_array_equal(sums.faces, faces)
    np.testing.assert_allclose(sums.face_step, steps, rtol=1e-5)
    np.testing.assert_allclose(sums.soft, probability.sum((1, 2, 3)), rtol=1e-5)
    for number in range(4):
        inside = index == number
        assert sums.entropy[number] == pytest.approx(entropy[inside].sum(), rel=1e-4)
        assert sums.confidence[number] == pytest.approx(probability[number][inside].sum())


def test_features_of_the_finished_labels() -> None:
    """Asymmetry, contact with the edge and what was removed are those of the label map."""
    spec = SPECS["3D"]
    labels = np.zeros(SHAPE, dtype=np.uint8)
    labels[4:8, 4:8, 4:8] = 2
    labels[0:2, 4:8, 4:8] = 5
    scores = torch.zeros((4, *SHAPE))
    scores[0] = 1
    scores[1][torch.from_numpy(labels == 2)] = 4
    scores[2][torch.from_numpy(labels == 5)] = 4
    scores[2, 12, 12, 12] = 4  # removed later
    collector = QualityCollector(torch.from_numpy(smooth())[None], spec)
    list(collector.pass_through(blocks_of(scores, [])))
    affine = oblique()
    found = quality_features(collector, labels, affine, spec, affine, affine)
    assert list(found.labels) == ["left part", "right part"]
    assert list(found.labels["left part"]) == list(LABEL_FEATURES)
    assert found.labels["left part"]["asymmetry"] == pytest.approx(1 / 3)
    assert found.labels["left part"]["edge"] == 0
    assert found.labels["right part"]["edge"] == pytest.approx(0.5)
    assert found.labels["left part"]["kept"] == pytest.approx(0)
    assert found.labels["right part"]["kept"] == pytest.approx(log(32 / 33))
    assert found.case["missing"] == pytest.approx(1 / 3)
    assert found.case["voxel_mm"] == pytest.approx(log(2.1))


def test_mirror_images_that_agree_and_that_do_not() -> None:
    """Equal decisions have a Dice of 1; a network that ignores its input flips with the image."""
    agreement = DecisionAgreement("softmax")
    scores = torch.randn(2, 3, 5, 4)
    agreement.add([agreement.decision(scores)] * 2, 3)
    assert agreement.dice.tolist() == [1, 1, 1]
    other = scores.clone()
    other[:, [0, 1]] = scores[:, [1, 0]]
    agreement = DecisionAgreement("softmax")
    agreement.add([agreement.decision(scores), agreement.decision(other)], 3)
    assert agreement.dice[0] == agreement.dice[1] == 0
    assert agreement.dice[2] == 1
    agreement = DecisionAgreement("sigmoid")
    agreement.add([agreement.decision(-scores.abs())] * 2, 3)
    assert np.isnan(agreement.dice).all()


def test_the_image_may_hold_a_constant(tmp_path: object) -> None:
    """A volume without any contrast gives features that are finite or left out."""
    spec = SPECS["3D"]
    image = MetaTensor(torch.ones((1, *SHAPE)))
    collector = QualityCollector(image, spec)
    list(collector.pass_through(blocks_of(torch.randn(4, *SHAPE), [])))
    labels = np.full(SHAPE, 9, dtype=np.uint8)
    found = quality_features(collector, labels, oblique(), spec, oblique(), oblique())
    assert found.labels["middle"]["clipped"] == 1
    assert np.isfinite(list(found.labels["middle"].values())[:1]).all()
