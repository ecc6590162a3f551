"""The U-Net recipe of 2015 (border weights, elastic deformation, losses, SGD), and the budget."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from monai.data import MetaTensor
from monai.losses import DiceCELoss, DiceLoss
from scipy import ndimage
from torch import nn

from pipeline.config.run import Augment, Run
from pipeline.config.spec import NetworkSpec, Spec
from pipeline.errors import ConfigError, ShapeError
from pipeline.networks import Ensemble, UNet, build_network
from pipeline.networks.losses import build_loss
from pipeline.training.optimisation import (
    Budget,
    build_optimizer,
    build_schedule,
    initialise,
    start_from,
    with_added_level,
)
from pipeline.training.precision import TrainingInferer
from pipeline.transforms.augmentation import augmentation
from pipeline.transforms.border_weights import WEIGHT, BorderWeightd, border_weights, class_weights
from pipeline.transforms.elastic_deformation import deform, dense_displacements
from pipeline.types import Array

RUN = Run(bundle="b", dataset="d", epochs=10, batch_size=2, learning_rate=0.1)


def spec_of(dims: int = 2, *, output: str = "softmax", padding: bool = True) -> Spec:
    return Spec(
        labels={"background": 0, "one": 1, "two": 2},
        channels=("T1w",),
        spacing=(1.0, 1.0, 1.0),
        roi_size=(48, 64, 56)[:dims],
        slice_axis="R" if dims == 2 else None,
        overlap=0.0,
        output=output,  # type: ignore[arg-type]
        network=NetworkSpec(features=(2, 4), padding=padding),
    )


def blobs(shape: tuple[int, ...]) -> Array:
    """Four objects of two classes, one of them touching another class."""
    classes = np.zeros(shape, dtype=np.int64)
    corner = (slice(1, 3),) * len(shape)
    classes[corner] = 1
    beside = (slice(3, 5), *corner[1:])
    classes[beside] = 2
    classes[(slice(-3, -1),) * len(shape)] = 1
    far = (0, *[-1] * (len(shape) - 1))
    classes[far] = 2
    return classes


def brute_force(classes: Array, spacing: list[float], weight: float, sigma: float) -> Array:
    """Every voxel against every voxel of every object."""
    objects = []
    for value in (1, 2):
        parts, count = ndimage.label(classes == value)
        objects += [np.argwhere(parts == n + 1) * spacing for n in range(count)]
    out = np.zeros(classes.shape)
    for place in np.ndindex(classes.shape):
        here = np.array(place) * spacing
        first, second = sorted(np.linalg.norm(thing - here, axis=1).min() for thing in objects)[:2]
        out[place] = weight * np.exp(-((first + second) ** 2) / (2 * sigma**2))
    return out


@pytest.mark.parametrize(
    ("shape", "spacing"), [((11, 13), [1.0, 1.0]), ((9, 8, 7), [0.8, 1.0, 4.5])]
)
def test_the_border_term_is_the_brute_force_one(
    shape: tuple[int, ...], spacing: list[float]
) -> None:
    classes = blobs(shape)
    assert np.allclose(
        border_weights(classes, spacing, 10.0, 5.0),
        brute_force(classes, spacing, 10.0, 5.0),
        rtol=1e-12,
    )


def test_border_weights_are_in_mm_of_the_affine() -> None:
    """Two objects two voxels apart: near along the fine axis, far along the coarse one."""
    affine = np.diag([1.0, 1.0, 6.0, 1.0])
    classes = np.zeros((9, 9, 9), dtype=np.float32)
    classes[4, 4, 4] = classes[7, 4, 4] = classes[4, 4, 7] = 1
    weight = BorderWeightd("label", 10.0, 5.0)(
        {"label": MetaTensor(torch.from_numpy(classes)[None], affine=torch.from_numpy(affine))}
    )[WEIGHT]
    expected = class_weights(classes) + brute_force(
        classes.astype(np.int64), [1.0, 1.0, 6.0], 10.0, 5.0
    )
    assert weight.shape == (1, 9, 9, 9)
    assert np.allclose(weight[0].numpy(), expected, rtol=1e-5)
    assert weight[0, 5, 4, 4] > 5 > weight[0, 4, 4, 5]


def test_one_object_has_no_border() -> None:
    classes = np.zeros((5, 6), dtype=np.int64)
    classes[2, 3] = 1
    assert not border_weights(classes, [1.0, 1.0], 10.0, 5.0).any()
    assert not border_weights(np.zeros((5, 6), dtype=np.int64), [1.0, 1.0], 10.0, 5.0).any()


def test_class_weights_balance_classes() -> None:
    classes = blobs((9, 8, 7))
    weights = class_weights(classes)
    sums = [weights[classes == value].sum() for value in (0, 1, 2)]
    assert np.allclose(sums, sums[0])
    assert weights.mean() == pytest.approx(1)


@pytest.mark.parametrize("shape", [(17, 22), (9, 14, 11)])
def test_the_dense_field_is_the_cubic_spline_through_the_points(shape: tuple[int, ...]) -> None:
    coarse = np.random.default_rng(0).normal(scale=10, size=(len(shape), *(3,) * len(shape)))
    places = np.meshgrid(*(np.linspace(0, 2, n) for n in shape), indexing="ij")
    expected = [ndimage.map_coordinates(part, places, order=3, mode="mirror") for part in coarse]
    field = dense_displacements(coarse, shape)
    assert np.abs(field.numpy() - expected).max() < 1e-4
    for corner in product((0, -1), repeat=len(shape)):
        ours, drawn = np.moveaxis(field.numpy(), 0, -1)[corner], np.moveaxis(coarse, 0, -1)[corner]
        assert np.allclose(ours, drawn, atol=1e-4)


@pytest.mark.parametrize("shape", [(17, 22), (9, 14, 11)])
def test_displacement_by_whole_voxels_is_a_shift(shape: tuple[int, ...]) -> None:
    x = torch.rand(2, *shape)
    field = torch.zeros(len(shape), *shape)
    field[1] = 3
    moved = deform(x, field, "bilinear")
    assert torch.allclose(moved[:, :, :-3], x[:, :, 3:], atol=1e-5)
    assert torch.allclose(moved[:, :, -3:], x[:, :, -4:-1].flip(2), atol=1e-5), (
        "mirrored at the border"
    )


@pytest.mark.parametrize("dims", [2, 3])
def test_image_and_label_are_deformed_together(dims: int) -> None:
    spec = spec_of(dims)
    still = Augment(
        affine_chance=0,
        noise_chance=0,
        blur_chance=0,
        intensity_chance=0,
        elastic_chance=1.0,
        elastic_sigma=4.0,
    )
    steps = augmentation(still, spec)
    ramp = torch.stack(
        torch.meshgrid(*(torch.linspace(0, 1, n) for n in spec.roi_size), indexing="ij")
    ).sum(0)[None]
    case = {"image": ramp, "label": (ramp > dims / 2).float(), WEIGHT: 1 + ramp}
    for step in steps:
        if hasattr(step, "set_random_state"):
            step.set_random_state(seed=5)
        case = step(case)
    assert set(case["label"].flatten().tolist()) == {0.0, 1.0}
    assert (case["image"] - ramp).abs().max() > 0.02
    assert torch.allclose(case[WEIGHT] - 1, case["image"], atol=1e-5)
    assert ((case["image"] > dims / 2).float() != case["label"]).float().mean() < 0.02


def test_the_default_loss_is_monais() -> None:
    torch.manual_seed(0)
    logits, target = torch.randn(2, 3, 8, 9), torch.randint(0, 3, (2, 1, 8, 9)).float()
    theirs = DiceCELoss(softmax=True, to_onehot_y=True, batch=True)(logits, target)
    assert torch.allclose(build_loss(spec_of(), RUN)(logits, target), theirs)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("order", ["channels first", "channels last"])
def test_its_gradient_is_monais(dims: int, order: str) -> None:
    """Also of a class that no voxel has, and of logits so large that one class is certain."""
    torch.manual_seed(0)
    size = (5, 6, 7)[:dims]
    target = torch.randint(0, 3, (2, 1, *size)).float()
    formats = {2: torch.channels_last, 3: torch.channels_last_3d}
    for scale in (1.0, 40.0):
        logits = (scale * torch.randn(2, 4, *size)).requires_grad_()
        seen = logits if order == "channels first" else logits.to(memory_format=formats[dims])
        (theirs,) = torch.autograd.grad(
            DiceCELoss(softmax=True, to_onehot_y=True, batch=True)(logits, target) * 3, logits
        )
        (ours,) = torch.autograd.grad(build_loss(spec_of(dims), RUN)(seen, target) * 3, logits)
        torch.testing.assert_close(ours, theirs, atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("balance", [0.5, 1.0])
def test_a_balance_weighs_the_cross_entropy_by_class(balance: float) -> None:
    """As torch's own weights do, gradient included; classes that are not there weigh nothing."""
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 6, 7, 8, requires_grad=True)
    target = (4 * torch.rand(2, 1, 6, 7, 8) ** 3).floor()
    counts = torch.bincount(target.long().flatten(), minlength=5)
    weight = torch.where(counts > 0, (counts.clamp(min=1) / counts.sum()) ** -balance, 0)
    dice = DiceLoss(softmax=True, to_onehot_y=True, batch=True)(logits, target)
    theirs = dice + nn.functional.cross_entropy(logits, target[:, 0].long(), weight=weight)
    ours = build_loss(spec_of(3), replace(RUN, balance=balance))(logits, target)
    torch.testing.assert_close(ours, theirs)
    for mine, other in zip(
        torch.autograd.grad(ours, logits), torch.autograd.grad(theirs, logits), strict=True
    ):
        torch.testing.assert_close(mine, other, atol=1e-7, rtol=1e-4)
    with pytest.raises(ConfigError, match=r"run.balance: expected 0 ≤ balance ≤ 1"):
        replace(RUN, balance=1.5)


def test_the_sigmoid_loss_takes_each_structure_for_itself() -> None:
    torch.manual_seed(0)
    logits, target = torch.randn(2, 2, 8, 9), torch.randint(0, 3, (2, 1, 8, 9)).float()
    structures = torch.cat([target == 1, target == 2], dim=1).float()
    theirs = DiceLoss(sigmoid=True, batch=True)(logits, structures) + nn.BCEWithLogitsLoss()(
        logits, structures
    )
    assert torch.allclose(build_loss(spec_of(output="sigmoid"), RUN)(logits, target), theirs)
    alone = build_loss(spec_of(output="sigmoid"), replace(RUN, loss="dice"))
    probability = torch.sigmoid(logits)
    overlap = (probability * structures).sum((0, 2, 3))
    expected = 1 - (2 * overlap + 1e-5) / (
        probability.sum((0, 2, 3)) + structures.sum((0, 2, 3)) + 1e-5
    )
    assert torch.allclose(alone(logits, target), expected.mean(), atol=1e-6)


def test_the_weighted_cross_entropy_is_the_sum_over_voxels() -> None:
    torch.manual_seed(0)
    logits, target = torch.randn(1, 3, 5, 6), torch.randint(0, 3, (1, 1, 5, 6)).float()
    weight = torch.rand(1, 1, 5, 6)
    found = build_loss(spec_of(), replace(RUN, loss="border_ce"))(
        logits, torch.cat([target, weight], dim=1)
    )
    terms = [
        weight[0, 0, i, j] * -logits[0, :, i, j].log_softmax(0)[int(target[0, 0, i, j])]
        for i in range(5)
        for j in range(6)
    ]
    assert torch.allclose(found, torch.stack(terms).sum() / weight.sum())


def test_a_larger_target_is_cropped_to_the_logits() -> None:
    spec, logits = spec_of(padding=False), torch.randn(1, 3, 4, 6)
    target = torch.randint(0, 3, (1, 1, 20, 22)).float()
    both = build_loss(spec, RUN)
    assert torch.equal(both(logits, target), both(logits, target[:, :, 8:12, 8:14]))
    with pytest.raises(
        ShapeError, match=r"target has shape \(1, 1, 4, 6\), expected \(1, 2, 4, 6\)"
    ):
        build_loss(spec, replace(RUN, loss="border_ce"))(logits, target)


@pytest.mark.parametrize("dims", [2, 3])
def test_he_initialisation_keeps_the_variance(dims: int) -> None:
    torch.manual_seed(0)
    net = UNet(dims, 1, 2, (32, 64), (2,))
    before = [p.clone() for p in net.parameters()]
    initialise(net, RUN)
    assert all(torch.equal(old, new) for old, new in zip(before, net.parameters(), strict=True)), (
        "default: as PyTorch does"
    )
    initialise(net, replace(RUN, initialisation="he"))
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.ConvTranspose3d):
            stride = 1 if isinstance(module, nn.Conv2d | nn.Conv3d) else prod(module.stride)
            incoming = module.in_channels * prod(module.kernel_size) / stride
            assert float(module.weight.detach().std()) == pytest.approx(
                (2 / incoming) ** 0.5, rel=0.15
            )
            assert module.bias is not None
            assert not module.bias.any()


@pytest.mark.parametrize("deep", [0, 1])
@pytest.mark.parametrize("dims", [2, 3])
def test_an_ensemble_learns_as_its_networks_alone(dims: int, deep: int) -> None:
    """The same gradients, to rounding, in each network as if it saw the batch by itself."""
    shape = NetworkSpec(features=(4, 6, 8), norm="instance", deep_supervision=deep, ensemble=2)
    spec = replace(spec_of(dims), network=shape)
    net = build_network(spec).train()
    assert isinstance(net, Ensemble)
    x, target = (
        torch.randn(2, 1, *[16] * dims),
        torch.randint(0, len(spec.labels), (2, 1, *[16] * dims)).float(),
    )
    both = build_loss(spec, RUN)(TrainingInferer(RUN)(x, net), target)
    both.backward()
    together = [[p.grad for p in member.parameters()] for member in net.members]
    net.zero_grad()
    alone = build_loss(replace(spec, network=replace(shape, ensemble=1)), RUN)
    values = [alone(member(x), target) for member in net.members]
    torch.stack(values).sum().backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(both, torch.stack(values).sum())
    for gradients, member in zip(together, net.members, strict=True):
        for gradient, parameter in zip(gradients, member.parameters(), strict=True):
            torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-6)


def test_the_optimizers() -> None:
    net = UNet(2, 1, 2, (2, 4))
    sgd = build_optimizer(net, replace(RUN, optimizer="sgd"))
    assert isinstance(sgd, torch.optim.SGD)
    assert sgd.defaults["momentum"] == 0.99
    assert isinstance(build_optimizer(net, RUN), torch.optim.AdamW)


@pytest.mark.parametrize(("minutes", "steps"), [(None, 40), (100.0, 40), (3.5, 14), (0.1, 1)])
def test_training_ends_with_its_time_and_the_rate_with_it(
    minutes: float | None, steps: int
) -> None:
    """Each step of this trainer takes 15 seconds of a fake clock; 10 epochs have 4 steps each."""
    clock = [1000.0]
    budget = Budget(minutes, now=lambda: clock[0])
    optimiser = build_optimizer(UNet(2, 1, 2, (2, 4)), RUN)
    rates = build_schedule(optimiser, RUN, 4, budget)
    seen = []

    def step(engine: Engine, batch: int) -> None:
        clock[0] += 15
        optimiser.step()
        rates.step()
        seen.append(rates.get_last_lr()[0])

    trainer = Engine(step)
    budget.attach(trainer)
    completed = []
    trainer.add_event_handler(Events.COMPLETED, lambda: completed.append(trainer.state.iteration))
    trainer.run(range(4), max_epochs=RUN.epochs)
    assert len(seen) == steps
    assert completed == [steps], "what is done at the end is done when the clock ends it too"
    assert max(seen) > 0.8 * RUN.learning_rate or steps == 1
    assert seen[-1] == pytest.approx(0, abs=1e-9)


def test_a_resumed_run_has_spent_its_time() -> None:
    clock = [5.0]
    budgets = [Budget(10.0, now=lambda: clock[0]) for _ in range(2)]
    rates = [
        build_schedule(build_optimizer(UNet(2, 1, 2, (2, 4)), RUN), RUN, 4, budget)
        for budget in budgets
    ]
    budgets[0]._start()
    clock[0] += 240
    rates[1].load_state_dict(rates[0].state_dict())
    assert budgets[1].used() == pytest.approx(0.4)
    assert rates[1].lr_lambda(0) == rates[0].lr_lambda(0)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"run\.minutes: expected more than 0"):
        replace(RUN, minutes=0.0)
    with pytest.raises(ConfigError, match=r"run\.border_sigma_mm"):
        replace(RUN, border_sigma_mm=0.0)
    with pytest.raises(ConfigError, match=r"elastic_grid: expected 2 points"):
        replace(RUN, augment=Augment(elastic_grid=1))


def test_a_coarser_network_becomes_the_lower_levels(tmp_path: Path) -> None:
    """The larger network's first deep output equals the coarser one's output."""
    torch.manual_seed(0)
    small = UNet(3, 1, 3, (6, 8, 10), norm="instance", deep_supervision=1)
    large = UNet(3, 1, 3, (4, 6, 8, 10), norm="instance", deep_supervision=2)
    before = {name: tensor.clone() for name, tensor in large.state_dict().items()}
    torch.save(small.state_dict(), tmp_path / "small.pt")
    start_from(large, replace(RUN, start=str(tmp_path / "small.pt"), grow=True))
    new = ("encoder.0.", "up.0.", "decoder.0.", "output.")
    assert all(
        torch.equal(tensor, before[name])
        for name, tensor in large.state_dict().items()
        if name.startswith(new)
    )
    for ours, theirs in (
        (large.bottleneck, small.bottleneck),
        (large.up[1], small.up[0]),
        (large.decoder[2], small.decoder[1]),
    ):
        assert all(
            torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True)
        )
    large.encoder[1] = small.encoder[0]
    large.encoder[0], large.pool[0] = (
        nn.Identity(),
        nn.Identity(),
    )  # the image reaches the second level as it is
    image = torch.rand(1, 1, 8, 16, 8)
    large.up[0], large.decoder[0] = nn.Identity(), nn.Conv3d(7, 4, 1)
    np.testing.assert_allclose(large(image)[1].detach(), small(image)[0].detach(), atol=1e-5)
    assert (
        with_added_level(small.state_dict(), large.state_dict()).keys() == large.state_dict().keys()
    )
