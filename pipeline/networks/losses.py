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

SMOOTH = 1e-5  # added to numerator and denominator of Dice, as in MONAI's DiceLoss


def build_loss(spec: Spec, run: Run) -> nn.Module:
    """Return the loss that a run names, for what the spec's network returns in training.

    Shapes:
        logits (B, outputs, *spatial), or a list of them with deep supervision; for an ensemble, a
        list with what each member returns. Target (B, 1, *spatial) channel numbers; `border_ce`
        needs the voxels' weights as a second channel. A target that is larger than the logits (a
        network without padding) is cropped to its centre.
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
    """The sum of the members' losses, so that each member learns as if it were trained alone.

    Args:
        member_loss: the loss of one member.

    Shapes:
        a list with what each member returns, and a target → a scalar.
    """

    def __init__(self, member_loss: nn.Module) -> None:
        super().__init__()
        self.member_loss = member_loss

    def forward(self, outputs: Sequence[Any], target: torch.Tensor) -> torch.Tensor:
        values = [self.member_loss(output, target) for output in outputs]
        return torch.stack(values).sum()


class DiceAndCrossEntropy(nn.Module):
    """Dice loss, computed over the whole batch, alone or plus cross-entropy.

    Args:
        sigmoid: whether each logit is a structure of its own, instead of a softmax over classes.
        cross_entropy: whether the cross-entropy is added.
        balance: exponent that gives rare classes more weight in the cross-entropy. A voxel's
            weight is its class's share of the batch to the power of -balance: 0 weights all
            voxels equally, 1 all classes. Only for softmax outputs.

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

    It reads and writes tensors of classes × voxels values fewer times than automatic
    differentiation does, which on a CPU costs much of the time of a step with many classes.
    With a balance, the cross-entropy is a weighted mean over voxels, as in
    `torch.nn.functional.cross_entropy(weight=…)`.

    Shapes:
        logits (B, C, *spatial), channel numbers (B, *spatial) int64, the balance → a scalar.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, target: torch.Tensor, balance: float = 0.0
    ) -> torch.Tensor:
        """Return the loss, and keep what the gradient needs."""
        classes = logits.shape[1]
        labels = target.reshape(-1, 1)  # (voxels, 1)
        log_probability = torch.log_softmax(
            logits.movedim(1, -1).reshape(-1, classes).float(), dim=1
        )  # (voxels, classes)
        counts = torch.bincount(labels[:, 0], minlength=classes)
        class_weight = (counts.clamp(min=1) / counts.sum()).float() ** -balance
        # (voxels,), with the sum 1
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
        # Derivatives of the Dice loss by a class's probability in a voxel: through the denominator
        # in all voxels, through the intersection in the voxels of that class only
        by_denominator = (2 * intersection + SMOOTH) / denominator**2 / classes
        by_intersection = -2 / denominator / classes
        # What target voxels add: from Dice, and from the cross-entropy, whose gradient is
        # weight · (probability - one-hot)
        at_target = target_probability * by_intersection[labels[:, 0]]
        # Softmax: d/dlogit = probability · (derivative - mean derivative under the probabilities)
        mean = (probability @ by_denominator + at_target - voxel_weight)[:, None]
        gradient = (by_denominator[None] - mean).mul_(probability)
        gradient.scatter_add_(1, labels, (at_target - voxel_weight)[:, None])
        shape = (ctx.shape[0], *ctx.shape[2:], classes)
        return gradient.mul_(grads[0]).reshape(shape).movedim(-1, 1).to(ctx.dtype), None, None


class WeightedCrossEntropy(nn.Module):
    """The mean of the voxels' cross-entropy under given weights.

    Args:
        sigmoid: whether each logit is a structure of its own, instead of a softmax over classes.

    Shapes:
        logits (B, outputs, *spatial), target (B, 2, *spatial) with channel numbers and weights →
        a scalar.
    """

    def __init__(self, *, sigmoid: bool) -> None:
        super().__init__()
        self.sigmoid = sigmoid

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        target = centre_crop(target, logits)
        _check_target(logits, target, channels=2)
        labels, weight = target[:, :1], target[:, 1:]
        weighted = weight * _voxel_cross_entropy(logits, labels, sigmoid=self.sigmoid)
        # A batch whose weights are all 0 has the loss 0, not nan
        return weighted.sum() / weight.sum().clamp(min=torch.finfo(weight.dtype).tiny)


def _voxel_cross_entropy(
    logits: torch.Tensor, target: torch.Tensor, *, sigmoid: bool
) -> torch.Tensor:
    """Return (B, 1, *spatial): each voxel's cross-entropy; for a sigmoid the structures' mean."""
    if sigmoid:
        one_hot = _one_hot(target, logits, sigmoid=True)
        each = functional.binary_cross_entropy_with_logits(logits, one_hot, reduction="none")
        return each.mean(dim=1, keepdim=True)
    return functional.cross_entropy(logits, target[:, 0].long(), reduction="none")[:, None]


def _one_hot(target: torch.Tensor, logits: torch.Tensor, *, sigmoid: bool) -> torch.Tensor:
    """Return channel numbers (B, 1, *spatial) one-hot in the shape of the logits.

    A sigmoid has no channel for the background, whose number is 0.
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
