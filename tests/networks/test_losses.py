"""Losses against MONAI's and torch's, gradients included, and the loss of an ensemble."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from monai.losses import DiceCELoss, DiceLoss
from torch import nn

from pipeline.config.run import Run
from pipeline.config.spec import NetworkSpec, Spec
from pipeline.errors import ConfigError, ShapeError
from pipeline.networks import Ensemble, build_network
from pipeline.networks.losses import build_loss
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
