"""Losses against MONAI's and torch's, gradients included, and the loss of an ensemble."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from monai.losses import DiceCELoss, DiceFocalLoss, DiceLoss, FocalLoss
from torch import nn

from pipeline.config.run import Run
from pipeline.config.spec import NetworkSpec, Spec
from pipeline.errors import ConfigError, ShapeError
from pipeline.networks import Ensemble, build_network
from pipeline.networks.losses import IGNORED, build_loss
from pipeline.training.precision import TrainingInferer

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


def test_a_balance_that_would_be_ignored_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"run.balance: expected 0 with the loss dice_focal"):
        replace(RUN, balance=0.5, loss="dice_focal")
    with pytest.raises(ConfigError, match=r"run.balance: got 0.5, expected 0 with output: sigmoid"):
        build_loss(spec_of(3, output="sigmoid"), replace(RUN, balance=0.5))


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


REGIONS = {"whole": (1, 4), "edge": (4,), "core": (1, 6)}


def regions_spec(**changes: Any) -> Spec:
    """A spec of three regions that share values, whose painting values are not their numbers."""
    labels = {"background": 0, "whole": 1, "edge": 4, "core": 6}
    return replace(spec_of(), labels=labels, output="regions", regions=dict(REGIONS), **changes)


def test_the_loss_of_regions_is_that_of_their_masks() -> None:
    """Masks as nnU-Net makes them, by the values of each region; MONAI's loss and autograd."""
    torch.manual_seed(0)
    spec = regions_spec()
    assert spec.target_values == (0, 1, 4, 6)
    values = torch.tensor([0, 1, 4, 6])[torch.randint(0, 4, (2, 1, 8, 9))]
    masks = [torch.isin(values, torch.tensor(region)) for region in REGIONS.values()]
    numbers = torch.tensor([0, 1, 0, 0, 2, 0, 3])[values].float()
    structures = torch.cat(masks, dim=1).float()
    logits = torch.randn(2, 3, 8, 9, requires_grad=True)
    theirs = DiceLoss(sigmoid=True, batch=True)(logits, structures)
    theirs = theirs + nn.BCEWithLogitsLoss()(logits, structures)
    ours = build_loss(spec, RUN)(logits, numbers)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(
        torch.autograd.grad(ours, logits), torch.autograd.grad(theirs, logits)
    )


LOSSES = ("dice_ce", "dice", "border_ce", "focal", "dice_focal", "tversky", "dice_topk")


def specs_with_ignored(deep: bool = False) -> dict[str, Spec]:
    spec = replace(spec_of(), ignore_label=9)
    if deep:
        spec = replace(spec, network=NetworkSpec(features=(2, 4, 6), deep_supervision=1))
    return {
        "softmax": spec,
        "sigmoid": replace(spec, output="sigmoid"),
        "regions": regions_spec(ignore_label=9),
    }


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("output", ["softmax", "sigmoid", "regions"])
def test_ignored_voxels_change_nothing(loss: str, output: str) -> None:
    """The labels below them, the logits above them: the same loss, and no gradient there.

    With no ignored voxel, the loss is that of a spec without an ignored label.
    """
    torch.manual_seed(0)
    spec, run = specs_with_ignored()[output], replace(RUN, loss=loss)  # type: ignore[arg-type]
    target = torch.randint(0, 3, (2, 1, 8, 9)).float()
    ignored = torch.rand(2, 1, 8, 9) < 0.4
    outputs = len(spec.outputs)
    logits = torch.randn(2, outputs, 8, 9, requires_grad=True)
    others = torch.where(ignored, torch.randn(2, outputs, 8, 9), logits.detach())
    weight = torch.rand(2, 1, 8, 9)

    def loss_of(logits: torch.Tensor, target: torch.Tensor, spec: Spec) -> torch.Tensor:
        full = torch.cat([target, weight], dim=1) if loss == "border_ce" else target
        value: torch.Tensor = build_loss(spec, run)(logits, full)
        return value

    masked = target.masked_fill(ignored, IGNORED)
    value = loss_of(logits, masked, spec)
    torch.testing.assert_close(loss_of(others, masked, spec), value)
    (gradient,) = torch.autograd.grad(value, logits)
    assert not (gradient * ignored).any()
    assert gradient.any()
    plain = replace(spec, ignore_label=None)
    torch.testing.assert_close(loss_of(logits, target, spec), loss_of(logits, target, plain))
    nothing = loss_of(logits, torch.full_like(target, IGNORED), spec)
    assert float(nothing.detach()) == 0
    (gradient,) = torch.autograd.grad(nothing, logits)
    assert not gradient.any()


def test_ignored_voxels_are_monais_ignore_index() -> None:
    """Its own implementation of Dice, and torch's of the cross-entropy; gradient included."""
    torch.manual_seed(0)
    target = torch.randint(0, 3, (2, 1, 8, 9)).float()
    target[torch.rand(2, 1, 8, 9) < 0.3] = IGNORED
    logits = torch.randn(2, 3, 8, 9, requires_grad=True)
    dice = DiceLoss(softmax=True, to_onehot_y=True, batch=True, ignore_index=IGNORED)
    theirs = dice(logits, target) + nn.functional.cross_entropy(
        logits, target[:, 0].long(), ignore_index=IGNORED
    )
    ours = build_loss(specs_with_ignored()["softmax"], RUN)(logits, target)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(
        torch.autograd.grad(ours, logits), torch.autograd.grad(theirs, logits)
    )


def test_ignored_voxels_with_deep_supervision() -> None:
    """The smaller targets are taken by the nearest voxel, so that none is half ignored."""
    torch.manual_seed(0)
    loss = build_loss(specs_with_ignored(deep=True)["softmax"], RUN)
    target = torch.randint(0, 3, (2, 1, 8, 12)).float()
    target[:, :, :, 6:] = IGNORED
    logits = [torch.randn(2, 3, 8, 12), torch.randn(2, 3, 4, 6)]
    others = [scores.clone() for scores in logits]
    for scores in others:
        scores[..., scores.shape[-1] // 2 :] = 7.0
    torch.testing.assert_close(loss(logits, target), loss(others, target))


def test_weights_of_classes_are_monais() -> None:
    """Of Dice and cross-entropy, gradient included; of binary cross-entropies too."""
    torch.manual_seed(0)
    run = replace(RUN, class_weights={"two": 3.0, "background": 0.5})
    logits = torch.randn(2, 3, 8, 9, requires_grad=True)
    target = torch.randint(0, 3, (2, 1, 8, 9)).float()
    weight = torch.tensor([0.5, 1.0, 3.0])
    theirs = DiceCELoss(softmax=True, to_onehot_y=True, batch=True, weight=weight)(logits, target)
    ours = build_loss(spec_of(), run)(logits, target)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(
        torch.autograd.grad(ours, logits)[0], torch.autograd.grad(theirs, logits)[0]
    )
    with pytest.raises(
        ConfigError, match=r"run.class_weights: expected names of outputs \(one, two"
    ):
        build_loss(spec_of(output="sigmoid"), run)
    with pytest.raises(
        ConfigError, match=r"run.class_weights: expected none with the loss tversky"
    ):
        replace(run, loss="tversky")


def test_focal_tversky_and_top_k_are_those_of_monai_and_torch() -> None:
    """With their parameters, in their limits: gamma 0, equal weights, all voxels."""
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 8, 9)
    target = torch.randint(0, 3, (2, 1, 8, 9)).float()
    spec = spec_of()

    def value(**changes: Any) -> torch.Tensor:
        found: torch.Tensor = build_loss(spec, replace(RUN, **changes))(logits, target)
        return found

    cross_entropy = nn.functional.cross_entropy(logits, target[:, 0].long())
    dice = DiceLoss(softmax=True, to_onehot_y=True, batch=True)(logits, target)
    # MONAI's focal loss is the mean over voxels and classes, not the sum over classes
    torch.testing.assert_close(value(loss="focal", focal_gamma=0.0), cross_entropy / 3)
    theirs = FocalLoss(gamma=3.0, use_softmax=True, to_onehot_y=True)(logits, target)
    torch.testing.assert_close(value(loss="focal", focal_gamma=3.0), theirs)
    torch.testing.assert_close(
        value(loss="tversky", tversky_weights=(0.5, 0.5)), dice, atol=1e-5, rtol=1e-4
    )
    assert value(loss="tversky", tversky_weights=(0.1, 0.9)) != value(loss="tversky")
    torch.testing.assert_close(value(loss="dice_topk", top_k=1.0), dice + cross_entropy)
    each = nn.functional.cross_entropy(logits, target[:, 0].long(), reduction="none")
    hardest = each.flatten().sort(descending=True).values[:14]  # a tenth of 144 voxels
    torch.testing.assert_close(value(loss="dice_topk", top_k=0.1), dice + hardest.mean())
    theirs = DiceFocalLoss(softmax=True, to_onehot_y=True, batch=True, gamma=2.0)(logits, target)
    torch.testing.assert_close(value(loss="dice_focal"), theirs)
