from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from phantom import (
    ORIENTATIONS,
    dice,
    make_bundle,
    nifti,
    oblique,
    parse_spec,
    reorient,
    spec_content,
)
from scipy import ndimage

from pipeline.bundle.opening import open_bundle
from pipeline.config.run import Run
from pipeline.config.spec import Spec
from pipeline.errors import ConfigError
from pipeline.inference import refinement
from pipeline.inference.aggregator import ScoreBlock
from pipeline.inference.memory_plan import estimate_memory
from pipeline.inference.predictor import predict_case
from pipeline.inference.probabilities import ProbabilityCollector
from pipeline.inference.refinement import refine_borders
from pipeline.io.header import read_header
from pipeline.transforms.patches import training_transform
from pipeline.transforms.preprocess import preprocessing

LABELS = {"background": 0, "white": 5, "grey": 9, "fluid": 3}
FINE = (60, 72, 48)  # voxels of 1 mm
STEP = 2  # of the network's voxels, in those


@pytest.fixture(scope="module")
def spec() -> Spec:
    """Return a spec with two tissues that touch, and a third one that is not refined."""
    return parse_spec(3, labels=LABELS, refine=[["white", "grey"]])


@pytest.fixture(scope="module")
def truth() -> Any:
    """Return grey matter with blades of white matter, 2 mm thick, in a block of fluid."""
    labels = np.zeros(FINE, dtype=np.uint8)
    labels[4:56, 5:66, 4:44] = 3
    labels[8:52, 9:62, 8:40] = 2
    labels[26:34, 12:58, 11:37] = 1
    for y in range(14, 57, 7):
        labels[12:48, y : y + 2, 14:34] = 1
    return labels


def probabilities(truth: Any) -> torch.Tensor:
    """Return the output of a good network of 2 mm voxels: blurred partial volumes."""
    parts = np.stack(
        [ndimage.gaussian_filter((truth == k).astype(np.float32), 1.2) for k in range(4)]
    )
    pooled = torch.nn.functional.avg_pool3d(torch.from_numpy(parts)[None], STEP)[0]
    return pooled / pooled.sum(dim=0)


def grid_of(affine: Any) -> Any:
    """Return the affine of the network's grid over that of the labels."""
    coarse = affine @ np.diag([STEP, STEP, STEP, 1.0])
    coarse[:3, 3] = affine[:3, :3] @ np.full(3, (STEP - 1) / 2) + affine[:3, 3]
    return coarse


def scan_of(truth: Any, greys: tuple[float, ...], noise: float = 3.0) -> Any:
    """Return grey values under a bias field that doubles from end to end."""
    rng = np.random.default_rng(0)
    field = np.linspace(0.7, 1.4, truth.shape[1], dtype=np.float32)[None, :, None]
    return np.asarray(greys, dtype=np.float32)[truth] * field + rng.normal(
        0, noise, truth.shape
    ).astype(np.float32)


def blurred(truth: Any) -> Any:
    """Return the labels that the probabilities give without the scan."""
    up = torch.nn.functional.interpolate(
        probabilities(truth)[None], scale_factor=STEP, mode="trilinear", align_corners=False
    )[0]
    return up.argmax(dim=0).to(torch.uint8).numpy()


def refine_labels(
    labels: Any, affine: Any, scan: Any, scan_affine: Any, truth: Any, spec: Spec
) -> Any:
    """Return labels refined by the probabilities of the contested classes."""
    likely = probabilities(truth)[list(spec.contested)].half()
    image = MetaTensor(torch.from_numpy(scan)[None], affine=torch.as_tensor(scan_affine))
    return refine_borders(
        torch.from_numpy(labels), affine, image, likely, grid_of(oblique((1.0, 1.0, 1.0))), spec
    ).numpy()


@pytest.mark.parametrize(
    "greys",
    [(5.0, 110.0, 80.0, 20.0), (5.0, 60.0, 95.0, 150.0)],
    ids=["white brighter", "grey brighter"],
)
def test_thin_blades_come_back(greys: tuple[float, ...], truth: Any, spec: Spec) -> None:
    """Whichever tissue is brighter, under a bias field; other voxels keep their class."""
    before = blurred(truth)
    after = refine_labels(
        before,
        oblique((1.0, 1.0, 1.0)),
        scan_of(truth, greys),
        oblique((1.0, 1.0, 1.0)),
        truth,
        spec,
    )
    assert dice(before == 1, truth == 1) < 0.9
    assert dice(after == 1, truth == 1) > 0.98
    assert dice(after == 2, truth == 2) > dice(before == 2, truth == 2)
    others = ~np.isin(before, (1, 2))
    np.testing.assert_array_equal(after[others], before[others])
    assert np.isin(after[~others], (1, 2)).all()


@pytest.mark.parametrize("axcodes", ORIENTATIONS)
def test_labels_and_scan_may_have_any_orientation(axcodes: str, truth: Any, spec: Spec) -> None:
    """The orientations of labels and scan, which may differ, change no voxel."""
    affine, scan = oblique((1.0, 1.0, 1.0)), scan_of(truth, (5.0, 110.0, 80.0, 20.0))
    before = blurred(truth)
    upright = refine_labels(before, affine, scan, affine, truth, spec)
    labels = reorient(nib.Nifti1Image(before, affine), axcodes)
    image = reorient(nib.Nifti1Image(scan, affine), axcodes[::-1])
    arrays = [np.ascontiguousarray(np.asarray(one.dataobj)) for one in (labels, image)]
    after = refine_labels(arrays[0], labels.affine, arrays[1], image.affine, truth, spec)
    back = np.asarray(nib.as_closest_canonical(nib.Nifti1Image(after, labels.affine)).dataobj)
    assert (back == upright).mean() > 0.999  # a voxel half-way between two takes either


@pytest.mark.parametrize("scan", ["flat", "noise", "nothing known"])
def test_a_scan_that_shows_no_border_moves_none(scan: str, truth: Any, spec: Spec) -> None:
    """Noise changes few voxels; nothing changes where no appearance is known."""
    affine, before = oblique((1.0, 1.0, 1.0)), blurred(truth)
    grey = scan_of(truth, (50.0,) * 4, noise=0.0 if scan == "flat" else 5.0)
    if scan == "flat":
        grey[:] = 50.0
    part = truth.copy()
    if scan == "nothing known":
        part[truth == 1] = 2
        part[::3][truth[::3] == 2] = 1
        before = blurred(part)
    after = refine_labels(before, affine, grey, affine, part, spec)
    assert (after != before).mean() <= {"flat": 0.0, "noise": 0.02, "nothing known": 0.0}[scan]


def test_voxels_without_a_choice_need_no_grey_values(
    truth: Any, spec: Spec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The labels are the same when the grey values of all contested voxels are compared.

    So they are where labels are not what the probabilities give, as those of a second network.
    """
    affine, before = oblique((1.0, 1.0, 1.0)), blurred(truth)
    before[:, 30:34][before[:, 30:34] == 1] = 2
    grey = scan_of(truth, (5.0, 110.0, 80.0, 20.0))
    found = refine_labels(before, affine, grey, affine, truth, spec)
    counts = []

    def every_voxel(probability: torch.Tensor, numbers: Any, labels: Any) -> Any:
        counts.append(int(is_open(probability, numbers, labels).sum()) / len(labels))
        return np.ones(len(labels), dtype=bool)

    is_open = refinement._is_open
    monkeypatch.setattr(refinement, "_is_open", every_voxel)
    np.testing.assert_array_equal(refine_labels(before, affine, grey, affine, truth, spec), found)
    assert 0 < max(counts) < 1


def test_noise_leaves_fewer_speckles(
    truth: Any, spec: Spec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neighbours decide where grey values are noisy: fewer parts, more voxels that are right."""
    affine, before = oblique((1.0, 1.0, 1.0)), blurred(truth)
    grey = scan_of(truth, (5.0, 110.0, 80.0, 20.0), noise=14.0)
    smooth = refine_labels(before, affine, grey, affine, truth, spec)
    monkeypatch.setattr(refinement, "NEIGHBOUR_WEIGHT", 0.0)
    plain = refine_labels(before, affine, grey, affine, truth, spec)
    parts = [ndimage.label(labels == 1)[1] for labels in (plain, smooth)]
    assert parts[1] < 0.5 * parts[0]
    assert dice(smooth == 1, truth == 1) > dice(plain == 1, truth == 1)
    assert dice(smooth == 1, truth == 1) > dice(before == 1, truth == 1)


def test_labels_without_any_choice_stay(truth: Any, spec: Spec) -> None:
    """Two tissues meet, but at the centre of each voxel only one of them is likely."""
    affine, shape = oblique((2.0, 2.0, 2.0)), tuple(n // STEP for n in FINE)
    flat = torch.ones(shape, dtype=torch.uint8)
    flat[15:] = 2
    likely = torch.stack([flat == 1, flat == 2]).half()
    grey = torch.from_numpy(scan_of(truth, (5.0, 110.0, 80.0, 20.0)))[None]
    scan = MetaTensor(grey, affine=torch.as_tensor(oblique((1.0, 1.0, 1.0))))
    assert torch.equal(refine_borders(flat, affine, scan, likely, affine, spec), flat)


def test_the_number_of_threads_changes_no_interpolated_value() -> None:
    """A number of positions that it does not divide, some of them beyond the edges."""
    fields, affine = torch.rand(2, 5, 7, 6), oblique((0.9, 1.3, 2.1))
    world = np.random.default_rng(2).uniform(-20, 20, size=(13, 3)) + affine[:3, 3]
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(refinement._sample_linear(fields, world, affine))
    finally:
        torch.set_num_threads(before)
    assert found[0].shape == (2, 13)
    assert torch.equal(*found)


def test_a_spot_deep_in_a_tissue_stays(truth: Any, spec: Spec) -> None:
    """A lesion as bright as the other tissue keeps its class: the network is sure."""
    affine, before = oblique((1.0, 1.0, 1.0)), blurred(truth)
    whole = truth.copy()
    whole[20:40, 12:58, 11:37] = 1
    before, grey = blurred(whole), scan_of(whole, (5.0, 110.0, 80.0, 20.0))
    grey[27:33, 30:36, 20:26] = 80.0
    after = refine_labels(before, affine, grey, affine, whole, spec)
    assert (after[27:33, 30:36, 20:26] == 1).all()


@pytest.mark.parametrize("together", [2**20, 250, 1])
def test_probabilities_are_held_as_blocks_come(
    together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the requested classes, by a softmax over all, however many are computed together."""
    monkeypatch.setattr("pipeline.inference.probabilities.SLAB_VALUES", together)
    logits = torch.randn(4, 9, 6, 5, generator=torch.Generator().manual_seed(0))
    shape = (9, 6, 5)
    blocks = [
        ScoreBlock(start=(0, 0, 0), scores=logits[:, :5].clone(), shape=shape),
        ScoreBlock(start=(4, 0, 0), scores=logits[:, 4:].clone(), shape=shape),
    ]
    collector = ProbabilityCollector((1, 3))
    for block in collector.pass_through(iter(blocks)):
        block.scores.zero_()
    expected = torch.softmax(logits, dim=0)
    assert collector.maps is not None
    np.testing.assert_allclose(collector.maps.float(), expected[[1, 3]], atol=1e-3)
    np.testing.assert_allclose(collector.voxels, expected.sum((1, 2, 3)), rtol=1e-5)


@pytest.mark.parametrize("spacing", [None, 1.1])
def test_the_whole_path_refines_the_borders_that_a_spec_names(
    spacing: float | None, tmp_path: Path
) -> None:
    """Only those borders move, in finer voxels too; only then the scan is carried along."""
    plain, fine = (
        open_bundle(
            make_bundle(tmp_path / name, refine=groups),
            device="cpu",
            runtime="torch",
            labels_spacing=spacing,
        )
        for name, groups in (("plain", []), ("fine", [["front", "back"]]))
    )
    before, after = predict_case(plain, nifti()), predict_case(fine, nifti())
    assert before.labels.shape == after.labels.shape
    assert ((before.labels == 0) == (after.labels == 0)).all()
    assert 0 < (before.labels != after.labels).mean() < 0.2
    assert not plain.preprocessing({"image": nifti()}).keys() - {"image"}
    np.testing.assert_array_equal(
        fine.preprocessing({"image": nifti()})["scan"][0], np.asarray(nifti().dataobj)
    )


def test_training_does_not_keep_the_scan() -> None:
    """Scans of any size could not be collated into one batch."""
    spec = parse_spec(3, refine=[["front", "back"]])
    labels = nifti((nifti().get_fdata() > 50).astype(np.float32) * 7)
    run = Run(bundle=".", dataset=".", epochs=1, batch_size=1, learning_rate=0.01)
    found = training_transform(preprocessing(spec), spec, run)({"image": nifti(), "label": labels})
    assert "scan" not in (found[0] if isinstance(found, list) else found)


@pytest.mark.parametrize(
    "refine", [[["front"]], [["front", "front"]], [["front", "side"]], [["background", "front"]]]
)
def test_invalid_groups_are_refused(refine: list[list[str]]) -> None:
    """The message names the key and the number of the group."""
    with pytest.raises(ConfigError, match=r"spec.refine\[0\]: expected"):
        parse_spec(3, refine=refine)


def test_its_memory_is_estimated(tmp_path: Path) -> None:
    """The scan and the probabilities of the contested classes are counted."""
    models = [
        open_bundle(
            make_bundle(tmp_path / str(bool(groups)), refine=groups), device="cpu", runtime="torch"
        )
        for groups in ([], [["front", "back"]])
    ]
    plain, fine = (
        estimate_memory(model, [read_header(nifti())], 0, float("inf")).network for model in models
    )
    assert fine - plain > 4 * nifti().get_fdata().size
    assert "refine" not in spec_content(3)
