"""The settings that a plan chooses from fingerprints, machine and time."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any

import numpy as np
import pytest
import torch
from dataset_folders import LABELS

from pipeline.config.parser import parse_config
from pipeline.config.run import Run
from pipeline.config.spec import Spec
from pipeline.io import Layout
from pipeline.networks import build_unet
from pipeline.training.planning.choices import (
    Choice,
    Processor,
    choose_duration,
    choose_larger_network,
    choose_settings,
    nested_values,
    steps_in_time,
    time_warnings,
    training_length,
)
from pipeline.training.planning.fingerprint import ChannelStatistics, Fingerprint
from pipeline.training.planning.presets import PRESETS, PresetName
from pipeline.training.planning.sides import has_side
from pipeline.training.planning.timing import TrainingTimes

LAYOUT = Layout(kind="test", cases=[], channels=("T1w",))
Size = tuple[int, int, int]


def print_of(
    shape: Size,
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0),
    *,
    box: Size | None = None,
    start: Size | None = None,
    **changes: Any,
) -> Fingerprint:
    """Return a fingerprint; the labels are in a box in the middle unless stated otherwise."""
    box = box or (max(1, shape[0] // 2), max(1, shape[1] // 2), max(1, shape[2] // 2))
    middle = tuple((whole - part) // 2 for whole, part in zip(shape, box, strict=True))
    zeros = changes.pop("zeros", 0.0)
    return Fingerprint(
        case="x",
        shape=shape,
        spacing=spacing,
        foreground_shape=box,
        foreground_start=start or (middle[0], middle[1], middle[2]),
        label_voxels=changes.pop("label_voxels", {1: 50}),
        zero_fraction=zeros,
        foreground_mean=1.0,
        foreground_std=1.0,
        nonzero_shape=changes.pop("nonzero_shape", shape),
        channels=changes.pop("channels", (channel(zeros),)),
        **changes,
    )


def channel(zeros: float = 0.0, mean: float = 100.0, std: float = 10.0) -> ChannelStatistics:
    return ChannelStatistics(
        zero_fraction=zeros,
        mean=mean,
        std=std,
        percentiles=(mean - 3 * std, mean, mean + 3 * std),
    )


def settings(
    fingerprints: list[Fingerprint],
    processor: Processor = "cpu",
    dims: int = 3,
    labels: dict[str, int] = LABELS,
    layout: Layout = LAYOUT,
    **options: Any,
) -> list[Choice]:
    return choose_settings(fingerprints, labels, layout, processor, dims, **options)


def chosen(*arguments: Any, **options: Any) -> dict[str, Any]:
    return {choice.name: choice.value for choice in settings(*arguments, **options)}


def test_small_crops_are_one_patch() -> None:
    crops = chosen([print_of((35, 50, 36))] * 5)
    assert crops["spec.roi_size"] == [40, 56, 40]
    assert crops["spec.network"]["strides"] == [[2, 2, 2]] * 3
    assert crops["spec.network"]["norm"] == "batch"
    assert crops["run.batch_size"] == 4


def test_thick_slices_keep_their_axis() -> None:
    """Slices are not pooled together, nor convolved, before the voxels are about cubes."""
    thick = chosen([print_of((256, 256, 24), (0.9, 0.9, 6.0))] * 5, "gpu")
    assert thick["spec.spacing"] == [0.9, 0.9, 6.0]
    assert thick["spec.network"]["strides"][:2] == [[2, 2, 1]] * 2
    assert thick["spec.network"]["kernels"][:2] == [[3, 3, 1]] * 2
    assert thick["spec.network"]["kernels"][-1] == [3, 3, 3]


def test_the_spacing_of_thick_slices_is_that_of_the_finest_cases() -> None:
    """nnU-Net's rule needs both longer voxels and fewer of them."""
    thick = [print_of((256, 256, 24), (0.9, 0.9, mm)) for mm in (3.0, 5.0, 6.0, 6.0, 6.0)]
    assert chosen(thick, "gpu")["spec.spacing"] == [0.9, 0.9, pytest.approx(3.8)]
    long = [print_of((256, 256, 200), (0.9, 0.9, mm)) for mm in (3.0, 5.0, 6.0, 6.0, 6.0)]
    assert _at_finest(settings(long, "gpu"))[2] == 6.0


def _at_finest(choices: list[Choice]) -> list[float]:
    """Return the spacing of the data, which the reason names if the network's is coarser."""
    choice = next(choice for choice in choices if choice.name == "spec.spacing")
    if not choice.reason.startswith("coarser"):
        value: list[float] = choice.value
        return value
    return [float(mm) for mm in choice.reason.partition("(")[2].partition(" mm")[0].split("×")]


def test_slabs_are_pooled_in_plane() -> None:
    slabs = chosen([print_of((182, 217, 18), box=(140, 170, 18))] * 40)
    assert slabs["spec.spacing"] == [1.0, 1.0, 1.0]
    assert 4 <= len(slabs["spec.network"]["strides"]) <= 5
    assert slabs["spec.roi_size"][2] >= 18, "a patch holds all slices of a thin slab"


def test_whole_brains_are_seen_well_enough() -> None:
    """Where a patch would see little of the structures, the voxels become coarser."""
    brain = [print_of((192, 256, 256), box=(145, 180, 145))] * 5
    choices = settings(brain)
    values = {choice.name: choice for choice in choices}
    spacing, size = values["spec.spacing"].value, values["spec.roi_size"].value
    assert 1.2 < spacing[0] == spacing[1] == spacing[2] < 2.6
    region = np.array((145, 180, 145)) / spacing
    assert np.prod(np.minimum(size, region)) >= 0.25 * np.prod(region)
    assert values["run.batch_size"].value == 2
    assert values["spec.network"].value["norm"] == "instance"
    assert "One network" in values["spec.spacing"].reason
    assert values["spec.spacing"].nnunet.startswith("3d_lowres")


def test_coarser_voxels_are_made_of_the_fine_axes_first() -> None:
    found = chosen([print_of((512, 512, 100), (0.6, 0.6, 3.0), box=(400, 400, 90))] * 5)
    assert found["spec.spacing"][0] > 1.2
    assert found["spec.spacing"][2] == 3.0 or found["spec.spacing"][0] > 1.45


def test_the_field_of_view_is_that_of_the_structures() -> None:
    """A small structure in a head needs neither coarser voxels nor a patch of the whole head."""
    found = chosen([print_of((192, 256, 256), box=(40, 50, 40))] * 5)
    assert found["spec.spacing"] == [1.0, 1.0, 1.0]
    assert all(
        side >= part for side, part in zip(found["spec.roi_size"], (40, 50, 40), strict=True)
    )


def test_what_is_zero_is_no_field_of_view() -> None:
    """A skull-stripped volume is cropped to what is not 0, as nnU-Net does."""
    padded = print_of((240, 240, 155), box=(140, 170, 135), nonzero_shape=(140, 170, 140))
    cropped = print_of((140, 170, 140), box=(140, 170, 135))
    sizes = [chosen([one] * 3, "gpu")["spec.roi_size"] for one in (padded, cropped)]
    assert np.prod(sizes[0]) == pytest.approx(np.prod(sizes[1]), rel=0.3)


def test_a_gpu_has_larger_patches_and_more_features() -> None:
    head = [print_of((192, 256, 256), box=(145, 180, 145))] * 5
    cpu, gpu = chosen(head), chosen(head, "gpu")
    assert np.prod(gpu["spec.roi_size"]) > 2 * np.prod(cpu["spec.roi_size"])
    assert gpu["spec.network"]["features"][0] > cpu["spec.network"]["features"][0]
    assert gpu["spec.spacing"][0] < cpu["spec.spacing"][0]


@pytest.mark.parametrize(
    ("shape", "spacing", "axis"),
    [
        ((256, 256, 24), (0.9, 0.9, 6.0), "S"),
        ((24, 256, 256), (6.0, 0.9, 0.9), "R"),
        ((140, 170, 150), (1.0, 1.0, 1.0), "S"),  # R is the shortest, and shows no side
        ((182, 217, 18), (1.0, 1.0, 1.0), "S"),
    ],
)
def test_slices_of_a_2d_network(
    shape: Size, spacing: tuple[float, float, float], axis: str
) -> None:
    """Across the thickest voxels, else axial."""
    found = chosen([print_of(shape, spacing)] * 9, dims=2)
    assert found["spec.slice_axis"] == axis
    assert len(found["spec.roi_size"]) == 2
    assert found["run.batch_size"] % found.get("run.patches_per_case", 1) == 0
    assert prod(found["spec.roi_size"]) * found["run.batch_size"] <= 500_000


@pytest.mark.parametrize(
    ("labels", "mirrored"),
    [
        ({"background": 0, "Anterior": 1, "Posterior": 2}, True),
        ({"background": 0, "Left-Putamen": 1, "Right-Putamen": 2}, False),
        ({"background": 0, "label 1": 1, "label 2": 2}, False),
        ({"background": 0, "label 1": 1}, True),
    ],
)
def test_mirroring_needs_labels_without_a_side(labels: dict[str, int], mirrored: bool) -> None:
    head = [print_of((180, 217, 181))] * 4
    assert chosen(head, labels=labels)["run.augment"]["mirror"] == (["R"] if mirrored else [])
    best = chosen(head, labels=labels, preset="best")
    assert best.get("spec.tta_mirror") == (["R"] if mirrored else None)


def test_labels_on_one_side_are_not_mirrored() -> None:
    one_sided = print_of((180, 217, 181), box=(30, 40, 30), start=(20, 80, 80))
    assert chosen([one_sided] * 4)["run.augment"]["mirror"] == []


def test_crops_are_mirrored_seldom() -> None:
    """They may all show one side of the body."""
    assert chosen([print_of((35, 50, 36))] * 4)["run.augment"]["mirror_chance"] == 0.1
    assert chosen([print_of((180, 217, 181))] * 4)["run.augment"]["mirror_chance"] == 0.5


@pytest.mark.parametrize(
    ("name", "sided"),
    [
        ("Left-Cerebral-White-Matter", True),
        ("ctx_rh_insula", True),
        ("hippocampus_L", True),
        ("R thalamus", True),
        ("LeftLung", True),
        ("liver", False),
        ("brain-stem", False),
        ("R", False),
        ("label 12", False),
        ("3rd ventricle", False),
    ],
)
def test_names_with_a_side(name: str, sided: bool) -> None:
    assert has_side(name) is sided


def test_normalisation_of_each_channel() -> None:
    """CT has fixed values from all cases; MR a z-score that single voxels do not change."""
    layout = replace(LAYOUT, channels=("CT", "T1w", "FLAIR"))
    cases = [
        print_of((90, 80, 70), channels=(channel(0, mean, 20.0), channel(0.6), channel(0.1)))
        for mean in (30.0, 40.0, 50.0)
    ]
    found = chosen(cases, layout=layout)
    spec = parse_config(Spec, nested_values(settings(cases, layout=layout), "spec."), "spec")
    ct = spec.intensity
    assert (ct.method, ct.clip, ct.mean) == ("fixed", (-20.0, 100.0), 40.0)
    assert ct.std == pytest.approx(np.sqrt(400 + np.var([30, 40, 50])), abs=0.01)
    assert found["spec.channel_intensity"]["T1w"]["nonzero"] is True
    assert found["spec.channel_intensity"]["FLAIR"]["nonzero"] is False
    assert spec.channel_intensity["T1w"].method == "robust_zscore"


def test_air_is_skipped_where_no_label_is_dark() -> None:
    airy = print_of((180, 217, 181), air_fraction=0.6, labelled_air=0.001)
    assert chosen([airy] * 3)["spec.foreground_threshold"] == 0.05
    for other in (replace(airy, labelled_air=0.3), replace(airy, air_fraction=0.1)):
        assert "spec.foreground_threshold" not in chosen([other] * 3)


def test_rare_labels_are_drawn_as_often_as_common_ones() -> None:
    """Where a patch does not hold all of them anyway, and weighed in the loss if there are many."""
    labels = {"background": 0} | {f"structure {chr(97 + i)}": i + 1 for i in range(20)}
    voxels = {value: 200 * 2**value for value in range(1, 21)}
    brain = [print_of((192, 256, 256), box=(145, 180, 145), label_voxels=voxels)] * 4
    found = chosen(brain, labels=labels)
    assert found["run.sampling"] == "balanced"
    assert found["run.balance"] == 0.75
    assert "run.balance" not in chosen(brain, "gpu", labels=labels)
    small = chosen([print_of((35, 50, 36), label_voxels={1: 10, 2: 5000})] * 4)
    assert "run.sampling" not in small
    assert "run.balance" not in small


@pytest.mark.parametrize("training_cases", [1, 2, 3, 5, 32, 208])
@pytest.mark.parametrize("dims", [2, 3])
def test_a_batch_needs_no_more_cases_than_there_are(training_cases: int, dims: int) -> None:
    """An epoch has at least one step, and about 20 or more."""
    choices = settings([print_of((35, 50, 36))] * 5, dims=dims, training_cases=training_cases)
    content = nested_values(choices, "run.") | {"bundle": "b", "dataset": "d", "epochs": 1}
    run = parse_config(Run, content, "run")
    assert run.cases_per_step <= training_cases
    assert training_cases * run.repeats // run.cases_per_step >= 20


def test_regions_and_ignored_voxels_come_from_the_dataset() -> None:
    labels = {"background": 0, "whole": 1, "core": 2}
    layout = replace(LAYOUT, labels=labels, regions={"whole": (1, 2), "core": (2,)}, ignore_label=9)
    choices = settings([print_of((35, 50, 36))] * 3, labels=labels, layout=layout)
    spec = parse_config(Spec, nested_values(choices, "spec."), "spec")
    assert spec.output == "regions"
    assert spec.regions == {"whole": (1, 2), "core": (2,)}
    assert spec.ignore_label == 9


def test_every_choice_has_a_reason() -> None:
    for choice in settings([print_of((192, 256, 256))] * 3, preset="best"):
        assert len(choice.reason) > 10
        assert choice.explanation.startswith(choice.reason)


@pytest.mark.parametrize("seed", range(60))
def test_every_plan_is_valid(seed: int) -> None:
    """For any data the spec is valid, no patch is larger than the volumes, poolings are legal."""
    random = np.random.default_rng(seed)
    dims = int(random.integers(2, 4))
    shapes = random.integers(8, 400, 3)
    fingerprints = []
    for _ in range(int(random.integers(2, 6))):
        shape = np.maximum(4, (shapes * random.uniform(0.8, 1.2, 3)).astype(int)).tolist()
        box = [max(1, int(size * random.uniform(0.1, 1))) for size in shape]
        mm = random.uniform(0.4, 5, 3).tolist()
        fingerprints.append(
            print_of(
                (shape[0], shape[1], shape[2]),
                (mm[0], mm[1], mm[2]),
                box=(box[0], box[1], box[2]),
                zeros=float(random.uniform(0, 0.8)),
            )
        )
    preset: PresetName = list(PRESETS)[int(random.integers(3))]
    processor: Processor = "gpu" if random.integers(2) else "cpu"
    choices = settings(fingerprints, processor, dims, preset=preset)
    choices = choose_larger_network(choices, float(random.uniform(10, 40_000)), preset)
    spec = parse_config(Spec, nested_values(choices, "spec."), "spec")
    content = nested_values(choices, "run.") | {"bundle": "b", "dataset": "d", "epochs": 1}
    parse_config(Run, content, "run")
    assert max(spec.network.features) <= 320
    steps = np.prod(spec.strides, axis=0)
    axes = [axis for axis in range(3) if axis != spec.slice_dim]
    sizes = [np.multiply(one.shape, one.spacing) / spec.spacing for one in fingerprints]
    median = np.median(sizes, axis=0)[axes]
    assert (np.array(spec.roi_size) <= np.ceil(median / steps) * steps).all()


@pytest.mark.parametrize("shape", [(35, 50, 36), (320, 320, 18), (7, 300, 90), (3, 4, 5)])
@pytest.mark.parametrize("dims", [2, 3])
def test_every_plan_is_a_network(shape: Size, dims: int) -> None:
    """The network accepts its patch."""
    choices = settings([print_of(shape, (1.0, 0.8, 2.5))] * 3, dims=dims)
    spec = parse_config(Spec, nested_values(choices, "spec."), "spec")
    net = build_unet(spec).eval()
    with torch.no_grad():
        small = [
            max(2 * step, n // 4 // step * step)
            for n, step in zip(spec.roi_size, np.prod(spec.strides, axis=0), strict=True)
        ]
        assert net(torch.zeros(1, 1, *small)).shape[2:] == tuple(small)


TIMES = TrainingTimes(steps={"float32": 2.5, "bfloat16": 2.0}, validation=30.0, around=20.0)


def test_the_length_fits_the_time() -> None:
    """The run has as many whole epochs as the time allows, its validation included."""
    assert TIMES.precision == "bfloat16"
    epochs, total = training_length(30, 50, TIMES)
    assert total <= 30 * 60 < total + 100 + 0.1 * 30 * 60
    assert total == epochs * 100 + 50
    assert training_length(0.01, 50, TIMES)[0] == 1


def test_a_time_limit_that_is_too_short_is_named() -> None:
    """The warning says by how much, and with the time that it asks for there is none."""
    (warning,) = time_warnings(3, TIMES)
    needed = float(warning.rpartition("--minutes ")[2].partition(" ")[0])
    assert "too short by about" in warning
    assert "30 s" in warning
    assert time_warnings(needed, TIMES) == []
    assert steps_in_time(needed - 2, TIMES) < 250
    assert steps_in_time(0.1, TIMES) == 0


@pytest.mark.parametrize(
    ("steps", "preset", "ensemble", "deep", "residual"),
    [
        (2000, "balanced", 1, 0, False),
        (6000, "balanced", 2, 0, False),
        (50_000, "balanced", 2, 0, False),
        (50_000, "fast", 1, 0, False),
        (4000, "best", 1, 1, False),
        (50_000, "best", 4, 1, True),
    ],
)
def test_a_larger_network_needs_the_time_for_it(
    steps: float, preset: PresetName, ensemble: int, deep: int, residual: bool
) -> None:
    choices = choose_larger_network(settings([print_of((35, 50, 36))] * 5), steps, preset)
    spec = parse_config(Spec, nested_values(choices, "spec."), "spec")
    assert spec.network.ensemble == ensemble
    assert spec.network.deep_supervision == deep
    assert spec.network.residual is residual


def test_duration() -> None:
    values = {choice.name: choice.value for choice in choose_duration(30, 17, 50, TIMES)}
    assert values["run.minutes"] == 30
    assert values["run.epochs"] == values["run.validate_every"] == 17
    assert values["run.precision"] == "bfloat16"
    assert 0.98 < values["run.ema_decay"] < 0.99
