"""The losses that a run can choose by name.

To add a loss, write its module here, add it to `build_loss` and its name to `Run.loss`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from monai.losses import DeepSupervisionLoss, DiceLoss
from torch import nn
from torch.nn import functional

from pipeline.config import Run, Spec
from pipeline.errors import ShapeError
from pipeline.networks.unet import centre_crop

SMOOTH = 1e-5  # added to numerator and denominator of Dice, as in MONAI's DiceLoss by default


def build_loss(spec: Spec, run: Run) -> nn.Module:
    """Return the loss that `run.loss` names, for the output of the spec's network in training.

    Args:
        spec: gives the kind of output, deep supervision and the size of the ensemble.
        run: gives `loss` and `balance`.

    Shapes:
        output and target → a scalar. The output is logits (B, outputs, *spatial); with deep
        supervision, a list of logits; for an ensemble, a list with the output of each member. The
        target is channel numbers (B, 1, *spatial); for `border_ce` (B, 2, *spatial) with the
        weight of each voxel as second channel. If the network has no padding, the target is larger
        than the logits and is cropped to its centre.
    """
    sigmoid = spec.output == "sigmoid"
    losses: dict[str, nn.Module] = {
        "dice_ce": DiceAndCrossEntropy(sigmoid=sigmoid, balance=run.balance),
        "dice": DiceAndCrossEntropy(sigmoid=sigmoid, cross_entropy=False),
        "border_ce": WeightedCrossEntropy(sigmoid=sigmoid),
    }
    loss = losses[run.loss]
    if spec.network.deep_supervision:
        loss = DeepSupervisionLoss(loss)
    return EnsembleLoss(loss) if spec.network.ensemble > 1 else loss


class EnsembleLoss(nn.Module):
    """The sum of the losses of an ensemble's members: each learns as if it were trained alone.

    Args:
        member_loss: loss of one member.

    Shapes:
        a list with the output of each member, and a target → a scalar.
    """

    def __init__(self, member_loss: nn.Module) -> None:
        super().__init__()
        self.member_loss = member_loss

    def forward(self, outputs: Sequence[Any], target: torch.Tensor) -> torch.Tensor:
        values = [self.member_loss(output, target) for output in outputs]
        return torch.stack(values).sum()


class DiceAndCrossEntropy(nn.Module):
    """Dice loss over the whole batch, with or without cross-entropy.

    Args:
        sigmoid: whether each channel is a structure of its own (probability by sigmoid), instead of
            one of several classes (softmax over the channels).
        cross_entropy: whether the cross-entropy is added.
        balance: exponent that gives rare classes more weight in the cross-entropy of a softmax. A
            voxel's weight is the fraction of the batch's voxels that have its class, to the power
            of -balance: with 0 all voxels have the same weight, with 1 all classes.

    Shapes:
        logits (B, outputs, *spatial), channel numbers (B, 1, *spatial) → a scalar.
    """

    def __init__(self, *, sigmoid: bool, cross_entropy: bool = True, balance: float = 0.0) -> None:
        super().__init__()
        self.sigmoid, self.cross_entropy, self.balance = sigmoid, cross_entropy, balance
        self.dice = DiceLoss(sigmoid=sigmoid, softmax=not sigmoid, batch=True)

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        target = centre_crop(target, logits)
        _check_target(logits, target, channels=1)
        value: torch.Tensor
        if self.cross_entropy and not self.sigmoid:
            value = SoftmaxDiceCrossEntropy.apply(  # type: ignore[no-untyped-call]
                logits, target[:, 0].long(), self.balance
            )
            return value
        value = self.dice(logits, _one_hot(target, logits, sigmoid=self.sigmoid))
        if self.cross_entropy:
            value = value + _voxel_cross_entropy(logits, target, sigmoid=self.sigmoid).mean()
        return value


class SoftmaxDiceCrossEntropy(torch.autograd.Function):
    """MONAI's `DiceCELoss(softmax=True, to_onehot_y=True, batch=True)` with an explicit gradient.

    It is faster than automatic differentiation, because it reads and writes tensors of classes ×
    voxels fewer times; with many classes this takes much of a training step on a CPU. With a
    balance, the cross-entropy is a weighted mean over voxels, as in
    `torch.nn.functional.cross_entropy(weight=…)`.

    Shapes:
        logits (B, C, *spatial), channel numbers (B, *spatial) int64, balance (a number, see
        `DiceAndCrossEntropy`) → a scalar.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, target: torch.Tensor, balance: float = 0.0
    ) -> torch.Tensor:
        """Return the loss, and save the tensors that `backward` needs in `ctx`."""
        classes = logits.shape[1]
        labels = target.reshape(-1, 1)  # (voxels, 1)
        log_probability = torch.log_softmax(
            logits.movedim(1, -1).reshape(-1, classes).float(), dim=1
        )  # (voxels, classes)
        counts = torch.bincount(labels[:, 0], minlength=classes)
        class_weight = (counts.clamp(min=1) / counts.sum()).float() ** -balance
        # (voxels,), normalised to a sum of 1
        voxel_weight = (class_weight / (class_weight * counts).sum())[labels[:, 0]]
        cross_entropy = -(log_probability.gather(1, labels)[:, 0] * voxel_weight).sum()
        probability = log_probability.exp_()  # in place: the largest tensor is held only once
        target_probability = probability.gather(1, labels)[:, 0]
        intersection = torch.zeros(classes, device=probability.device)
        intersection.index_add_(0, labels[:, 0], target_probability)
        denominator = probability.sum(dim=0) + counts + SMOOTH
        ctx.save_for_backward(
            probability, labels, target_probability, intersection, denominator, voxel_weight
        )
        ctx.shape, ctx.dtype = logits.shape, logits.dtype
        return cross_entropy + (1 - (2 * intersection + SMOOTH) / denominator).mean()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Return the gradient with respect to the logits."""
        probability, labels, target_probability, intersection, denominator, voxel_weight = (
            ctx.saved_tensors
        )
        classes = probability.shape[1]
        # Derivative of the Dice loss with respect to the probability p of a class in a voxel: p is
        # part of the denominator in all voxels, of the intersection only in the voxels of its class
        by_denominator = (2 * intersection + SMOOTH) / denominator**2 / classes
        by_intersection = -2 / denominator / classes
        # Part that only the target class of each voxel has. The derivative of the cross-entropy by
        # the logits is weight · (probability - one-hot)
        at_target = target_probability * by_intersection[labels[:, 0]]
        # Chain rule through the softmax: d/dlogit = p · (d/dp - sum over classes of p · d/dp)
        mean = (probability @ by_denominator + at_target - voxel_weight)[:, None]
        gradient = (by_denominator[None] - mean).mul_(probability)
        gradient.scatter_add_(1, labels, (at_target - voxel_weight)[:, None])
        shape = (ctx.shape[0], *ctx.shape[2:], classes)
        return gradient.mul_(grads[0]).reshape(shape).movedim(-1, 1).to(ctx.dtype), None, None


class WeightedCrossEntropy(nn.Module):
    """Cross-entropy, averaged over voxels with a weight for each voxel.

    Args:
        sigmoid: whether each channel is a structure of its own (probability by sigmoid), instead of
            one of several classes (softmax over the channels).

    Shapes:
        logits (B, outputs, *spatial), target (B, 2, *spatial) with channel number and weight of
        each voxel → a scalar.
    """

    def __init__(self, *, sigmoid: bool) -> None:
        super().__init__()
        self.sigmoid = sigmoid

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        target = centre_crop(target, logits)
        _check_target(logits, target, channels=2)
        labels, weight = target[:, :1], target[:, 1:]
        weighted = weight * _voxel_cross_entropy(logits, labels, sigmoid=self.sigmoid)
        # a batch in which all weights are 0 has the loss 0, not nan
        return weighted.sum() / weight.sum().clamp(min=torch.finfo(weight.dtype).tiny)


def _voxel_cross_entropy(
    logits: torch.Tensor, target: torch.Tensor, *, sigmoid: bool
) -> torch.Tensor:
    """Return the cross-entropy of each voxel, (B, 1, *spatial).

    With a sigmoid, it is the mean of the structures' binary cross-entropies.
    """
    if sigmoid:
        one_hot = _one_hot(target, logits, sigmoid=True)
        each = functional.binary_cross_entropy_with_logits(logits, one_hot, reduction="none")
        return each.mean(dim=1, keepdim=True)
    return functional.cross_entropy(logits, target[:, 0].long(), reduction="none")[:, None]


def _one_hot(target: torch.Tensor, logits: torch.Tensor, *, sigmoid: bool) -> torch.Tensor:
    """Return channel numbers (B, 1, *spatial) as a one-hot tensor with the shape of the logits.

    The logits of a sigmoid have no channel for the background (number 0).
    """
    first = 1 if sigmoid else 0
    numbers = torch.arange(first, first + logits.shape[1], device=target.device)
    return (target == numbers.view(1, -1, *[1] * (target.ndim - 2))).to(logits.dtype)


def _check_target(logits: torch.Tensor, target: torch.Tensor, *, channels: int) -> None:
    expected = (logits.shape[0], channels, *logits.shape[2:])
    if target.shape != expected:
        raise ShapeError(
            f"target has shape {tuple(target.shape)}, expected {tuple(expected)} for logits of "
            f"{tuple(logits.shape)}; does the run's loss fit its transforms?"
        )
