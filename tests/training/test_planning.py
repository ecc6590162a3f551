"""Planning: fingerprints, problems, choices, folds, and the whole plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from dataset_folders import LABELS, LAYOUTS, decathlon, image, label
from phantom import SPACING, oblique, reorient, save, smooth

from pipeline.bundle.check import check_bundle
from pipeline.cli.app import main
from pipeline.io.layouts import find_pairs
from pipeline.training.planning.choices import (
    Processor,
    choose_settings,
    nested_values,
    training_length,
)
from pipeline.training.planning.fingerprint import Fingerprint, take_fingerprints
from pipeline.training.planning.folds import make_folds
from pipeline.training.planning.timing import TrainingTimes


def test_every_broken_case_is_named(tmp_path: Path) -> None:
    """Another grid, unknown values, fractions, a damaged file, a duplicate.

    A case without any label is none of them.
    """
    (root,) = decathlon(tmp_path, count=9)

    def image_of(i: int) -> Path:
        return root / "imagesTr" / f"case_{i}.nii.gz"

    def label_of(i: int) -> Path:
        return root / "labelsTr" / f"case_{i}.nii.gz"

    values = np.asarray(label(0).dataobj)
    shifted = oblique()
    shifted[0, 3] += 1
    save(label_of(1), nib.Nifti1Image(np.asarray(label(1).dataobj), shifted))
    save(label_of(2), nib.Nifti1Image(values[:-1], oblique()))
    save(label_of(3), nib.Nifti1Image(np.where(values == 2, 5, values).astype(np.uint8), oblique()))
    save(label_of(4), nib.Nifti1Image(values * np.float32(0.7), oblique()))
    save(label_of(5), nib.Nifti1Image(values * np.uint8(0), oblique()))
    image_of(6).write_bytes(image_of(6).read_bytes()[:200])
    save(image_of(7), image(0))
    layout = find_pairs([root])
    prints, problems = take_fingerprints(layout)
    assert [p.case for p in prints] == ["case_0", "case_5", "case_8"]
    assert [p.has_foreground for p in prints] == [True, False, True]
    messages = {problem.case: problem.message for problem in problems}
    expected = {
        "case_1": "1.00 mm from its image",
        "case_2": "has shape",
        "case_3": "has the values 5",
        "case_4": "whole numbers",
        "case_6": "truncated",
        "case_7": "is that of case_0",
    }
    assert set(messages) == set(expected)
    assert all(text in messages[case] for case, text in expected.items())


@pytest.mark.parametrize("axcodes", ["RAS", "LIA", "SPR"])
def test_fingerprints_are_of_the_body_not_of_the_file(axcodes: str, tmp_path: Path) -> None:
    """Shape, spacing and box are along right, anterior, superior in every orientation."""
    save(tmp_path / "images" / "a.nii.gz", reorient(image(), axcodes))
    save(tmp_path / "labels" / "a.nii.gz", reorient(label(), axcodes))
    (one,), problems = take_fingerprints(find_pairs([tmp_path]))
    assert problems == []
    assert one.shape == (17, 24, 21)
    assert one.spacing == pytest.approx(SPACING)
    values = np.asarray(label().dataobj)
    places = np.argwhere(values > 0)
    assert one.foreground_shape == tuple(np.ptp(places, axis=0) + 1)
    assert one.label_voxels == {1: int((values == 1).sum()), 2: int((values == 2).sum())}
    inside = smooth()[values > 0]
    assert one.foreground_mean == pytest.approx(inside.mean(), rel=1e-4)
    assert one.foreground_std == pytest.approx(inside.std(), rel=1e-4)


def print_of(
    shape: tuple[int, int, int], spacing: tuple[float, float, float], zeros: float = 0.0
) -> Fingerprint:
    return Fingerprint(
        case="x",
        shape=shape,
        spacing=spacing,
        foreground_shape=(9, 9, 9),
        label_voxels={1: 50},
        zero_fraction=zeros,
        foreground_mean=1.0,
        foreground_std=1.0,
    )


def chosen(
    fingerprints: list[Fingerprint], processor: Processor = "cpu", dims: int = 3
) -> dict[str, Any]:
    choices = choose_settings(fingerprints, LABELS, ["T1w"], processor, dims)
    return {choice.name: choice.value for choice in choices}


def test_choices_follow_the_data() -> None:
    """Small crops are one patch, thick slices keep their axis, stripped volumes ignore zeros."""
    crops = chosen([print_of((35, 50, 36), (1.0, 1.0, 1.0))] * 5)
    assert crops["spec.roi_size"] == [40, 56, 40]
    assert crops["spec.network"]["strides"] == [[2, 2, 2]] * 3
    assert crops["spec.intensity"]["nonzero"] is False
    thick = chosen([print_of((256, 256, 24), (0.9, 0.9, 6.0), zeros=0.6)] * 5)
    assert thick["spec.spacing"] == [0.9, 0.9, 6.0]
    assert thick["spec.network"]["strides"][0] == [2, 2, 1]
    assert thick["spec.intensity"]["nonzero"] is True
    mixed = chosen([print_of((256, 256, 24), (0.9, 0.9, mm)) for mm in (3.0, 5.0, 6.0, 6.0, 6.0)])
    assert 3.0 <= mixed["spec.spacing"][2] < 5.0


def test_choices_follow_the_machine() -> None:
    """A GPU gets larger patches and more features; slices lie across the thick axis."""
    head = [print_of((192, 256, 256), (1.0, 1.0, 1.0))] * 5
    cpu, gpu = chosen(head), chosen(head, "gpu")
    assert np.prod(gpu["spec.roi_size"]) > 2 * np.prod(cpu["spec.roi_size"])
    assert gpu["spec.network"]["features"][0] > cpu["spec.network"]["features"][0]
    slices = chosen([print_of((256, 256, 24), (0.9, 0.9, 6.0))] * 5, dims=2)
    assert slices["spec.slice_axis"] == "S"
    assert len(slices["spec.roi_size"]) == 2
    assert slices["run.batch_size"] % slices["run.patches_per_case"] == 0


@pytest.mark.parametrize(
    "shape", [(35, 50, 36), (181, 217, 181), (320, 320, 18), (7, 300, 90), (512, 512, 300)]
)
@pytest.mark.parametrize("dims", [2, 3])
def test_every_plan_is_a_network(shape: tuple[int, int, int], dims: int) -> None:
    """For all sizes of data the spec is valid, and the network accepts its patch."""
    from pipeline.config.parser import parse_config
    from pipeline.config.spec import Spec
    from pipeline.networks import build_unet

    found = choose_settings([print_of(shape, (1.0, 0.8, 2.5))] * 3, LABELS, ["T1w"], "cpu", dims)
    spec = parse_config(Spec, nested_values(found, "spec."), "spec")
    assert max(spec.network.features) <= 320
    net = build_unet(spec).eval()
    with torch.no_grad():
        small = [
            max(2 * step, n // 4 // step * step)
            for n, step in zip(spec.roi_size, np.prod(spec.strides, axis=0), strict=True)
        ]
        assert net(torch.zeros(1, 1, *small)).shape[2:] == tuple(small)


def test_folds_keep_subjects_together() -> None:
    """Each case is held out once, subjects are never split, and the folds are repeatable."""
    names = [f"sub-{i:02}_ses-{s}_T1w" for i in range(13) for s in "ab"] + [
        f"p{i}_{side}" for i in range(9) for side in ("L", "R")
    ]
    found = make_folds(names)
    assert len(found) == 5
    assert sorted(name for fold in found for name in fold["val"]) == sorted(names)
    for fold in found:
        assert sorted(fold["train"] + fold["val"]) == sorted(names)
        subjects = [
            {name.rpartition("_")[0].partition("_ses")[0] for name in fold[part]}
            for part in ("train", "val")
        ]
        assert not subjects[0] & subjects[1]
        assert abs(len(fold["val"]) - len(names) / 5) <= 3
    assert make_folds(list(reversed(names))) == found
    assert len(make_folds(["a", "b", "c"])) == 3


def test_the_length_fits_the_time() -> None:
    """The run has as many whole epochs as the time allows."""
    pace = TrainingTimes(steps={"float32": 2.5, "bfloat16": 2.0}, validation=30.0, around=20.0)
    assert pace.precision == "bfloat16"
    epochs, total = training_length(30, 50, pace)
    assert total <= 30 * 60 < total + 100 + 0.1 * 30 * 60
    assert total == epochs * 100 + 50
    assert training_length(0.01, 50, pace)[0] == 1


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.slow
def test_plan_train_evaluate(name: str, tmp_path: Path) -> None:
    """Three commands lead from a folder to a bundle that passes its checks and has a score."""
    places = [str(place) for place in LAYOUTS[name][0](tmp_path / "data")]
    config = tmp_path / "mine.yaml"
    threads = torch.get_num_threads()
    planned = run("plan", *places, "-o", str(config), "--minutes", "0.2")
    assert planned.exit_code == 0, planned.output
    assert "spec.spacing: [0.9, 1.3, 2.1]  (that of all cases)" in planned.stdout
    written = yaml.safe_load(config.read_text())
    assert f"run.epochs: {written['epochs']}  (" in planned.stdout
    assert run("plan", *places, "-o", str(config)).exit_code == 2  # what is there is not lost
    trained = run(
        "train", str(config), "epochs=1", "batch_size=2", "patches_per_case=1", "validate_every=1"
    )
    torch.set_num_threads(threads)
    assert trained.exit_code == 0, trained.output
    assert not any(check_bundle(tmp_path / "mine").values())
    if len(places) == 1:
        evaluated = run(
            "evaluate",
            str(tmp_path / "mine"),
            places[0],
            "-o",
            str(tmp_path / "out"),
            "--splits",
            written["splits"],
            "--fold",
            "1",
        )
        assert evaluated.exit_code == 0, evaluated.output
