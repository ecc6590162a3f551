"""What training makes small."""

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

SMOOTH = 1e-5  # of Dice, as MONAI has it


def build_loss(spec: Spec, run: Run) -> nn.Module:
    """The loss that a run names, for the output that a spec has, at each resolution that the network gives while training.

    Shapes: logits (B, outputs, *spatial), or a list of them; of an ensemble, a list of what each network gives; target
    (B, 1, *spatial) channel numbers, with their weights as a second channel for `border_ce`. Targets larger than the logits
    (no padding) are cropped to their middle.
    """
    sigmoid = spec.output == "sigmoid"
    parts: dict[str, nn.Module] = {
        "dice_ce": DiceAndCrossEntropy(sigmoid=sigmoid, balance=run.balance),
        "dice": DiceAndCrossEntropy(sigmoid=sigmoid, cross_entropy=False),
        "border_ce": WeightedCrossEntropy(sigmoid=sigmoid),
    }
    one = parts[run.loss]
    each = DeepSupervisionLoss(one) if spec.network.deep_supervision else one
    return EnsembleLoss(each) if spec.network.ensemble > 1 else each


class EnsembleLoss(nn.Module):
    """The sum of the losses of an ensemble's networks: each learns as if it were alone.

    Args:
        one: the loss of one network.

    Shapes: a list of what each network gives, target → a number.
    """

    def __init__(self, one: nn.Module) -> None:
        super().__init__()
        self.one = one

    def forward(self, outputs: Sequence[Any], target: torch.Tensor) -> torch.Tensor:
        value: torch.Tensor = torch.stack([self.one(output, target) for output in outputs]).sum()
        return value


class DiceAndCrossEntropy(nn.Module):
    """Dice over the batch, alone or plus cross-entropy.

    Args:
        sigmoid: whether there is a logit a structure, each for itself, and not one for each class.
        cross_entropy: whether it is added.
        balance: by how much rare classes weigh more in it: a voxel's weight falls with that power of its class's share of the
            batch; 0 weighs all voxels alike, 1 all classes. For softmax outputs.

    Shapes: logits (B, outputs, *spatial), channel numbers (B, 1, *spatial) → a number.
    """

    def __init__(self, *, sigmoid: bool, cross_entropy: bool = True, balance: float = 0.0) -> None:
        super().__init__()
        self.sigmoid, self.cross_entropy, self.balance = sigmoid, cross_entropy, balance
        self.dice = DiceLoss(sigmoid=sigmoid, softmax=not sigmoid, batch=True)

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        target = centre_crop(target, logits.shape[2:])
        _check(logits, target, 1)
        if self.cross_entropy and not self.sigmoid:
            return SoftmaxDiceCrossEntropy.apply(logits, target[:, 0].long(), self.balance)  # type: ignore[no-any-return, no-untyped-call]
        one_hot = _one_hot(target, logits, sigmoid=self.sigmoid)
        value: torch.Tensor = self.dice(logits, one_hot)
        if self.cross_entropy:
            value = value + _cross_entropy(logits, target, sigmoid=self.sigmoid).mean()
        return value


class SoftmaxDiceCrossEntropy(torch.autograd.Function):
    """MONAI's `DiceCELoss(softmax=True, to_onehot_y=True, batch=True)` with its gradient written out.

    With a balance the cross-entropy is the weighted mean over voxels, as `torch.nn.functional.cross_entropy(weight=…)` has it.

    Passes over classes × voxels numbers fewer times than automatic differentiation: with many classes these cost a CPU much.

    Shapes: logits (B, C, *spatial), channel numbers (B, *spatial) int64, the balance → a number.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, target: torch.Tensor, balance: float = 0.0
    ) -> torch.Tensor:
        """The loss; keeps probabilities for the way back."""
        classes, labels = logits.shape[1], target.reshape(-1, 1)
        rows = torch.log_softmax(
            logits.movedim(1, -1).reshape(-1, classes).float(), dim=1
        )  # (voxels, C)
        counts = torch.bincount(labels[:, 0], minlength=classes)
        weight = (counts.clamp(min=1) / counts.sum()).float() ** -balance
        share = (weight / (weight * counts).sum())[
            labels[:, 0]
        ]  # of each voxel in the mean; they sum to 1
        entropy = -(rows.gather(1, labels)[:, 0] * share).sum()
        probability = rows.exp_()
        chosen = probability.gather(1, labels)[:, 0]
        both = torch.zeros(classes, device=chosen.device).index_add_(0, labels[:, 0], chosen)
        sizes = probability.sum(dim=0) + counts + SMOOTH
        ctx.save_for_backward(probability, labels, chosen, both, sizes, share)
        ctx.shape, ctx.dtype = logits.shape, logits.dtype
        return entropy + (1 - (2 * both + SMOOTH) / sizes).mean()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """The gradient with respect to the logits."""
        probability, labels, chosen, both, sizes, share = ctx.saved_tensors
        classes = probability.shape[1]
        every = (
            (2 * both + SMOOTH) / sizes**2 / classes
        )  # of the loss, by each probability of a class
        hit = -2 / sizes / classes  # and by that of the voxels that are of the class
        there = chosen * hit[labels[:, 0]]
        pull = every[None] - (probability @ every + there - share)[:, None]
        gradient = pull.mul_(probability)
        gradient.scatter_add_(1, labels, (there - share)[:, None])
        shape = (ctx.shape[0], *ctx.shape[2:], classes)
        return (gradient.mul_(grads[0])).reshape(shape).movedim(-1, 1).to(ctx.dtype), None, None


class WeightedCrossEntropy(nn.Module):
    """The mean of the cross-entropy times each voxel's weight, over the sum of the weights.

    Shapes: logits (B, outputs, *spatial), target (B, 2, *spatial): channel numbers and weights → a number.
    """

    def __init__(self, *, sigmoid: bool) -> None:
        super().__init__()
        self.sigmoid = sigmoid

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        target = centre_crop(target, logits.shape[2:])
        _check(logits, target, 2)
        weight = target[:, 1:]
        entropy = _cross_entropy(logits, target[:, :1], sigmoid=self.sigmoid)
        return (weight * entropy).sum() / weight.sum().clamp(min=torch.finfo(weight.dtype).tiny)


def _cross_entropy(logits: torch.Tensor, target: torch.Tensor, *, sigmoid: bool) -> torch.Tensor:
    """(B, 1, *spatial): of every voxel; with a sigmoid the mean over the structures."""
    if sigmoid:
        one_hot = _one_hot(target, logits, sigmoid=True)
        return functional.binary_cross_entropy_with_logits(logits, one_hot, reduction="none").mean(
            dim=1, keepdim=True
        )
    return functional.cross_entropy(logits, target[:, 0].long(), reduction="none")[:, None]


def _one_hot(target: torch.Tensor, logits: torch.Tensor, *, sigmoid: bool) -> torch.Tensor:
    """Channel numbers (B, 1, *spatial) as 0 and 1 a class, the background left out with a sigmoid."""
    first = 1 if sigmoid else 0
    numbers = torch.arange(first, first + logits.shape[1], device=target.device)
    return (target == numbers.view(1, -1, *[1] * (target.ndim - 2))).to(logits.dtype)


def _check(logits: torch.Tensor, target: torch.Tensor, channels: int) -> None:
    expected = (logits.shape[0], channels, *logits.shape[2:])
    if target.shape != expected:
        raise ShapeError(f"target has shape {tuple(target.shape)}, expected {tuple(expected)} beside logits of "
                         f"{tuple(logits.shape)}; does the run's loss fit its transforms?")  # fmt: skip
