"""What training makes small."""

from __future__ import annotations

import torch
from monai.losses import DeepSupervisionLoss, DiceLoss
from torch import nn
from torch.nn import functional

from pipeline.errors import ShapeError
from pipeline.network import centre
from pipeline.run import Run
from pipeline.spec import Spec


def loss(spec: Spec, run: Run) -> nn.Module:
    """The loss that a run names, for the output that a spec has, at each resolution that the network gives while training.

    Shapes: logits (B, outputs, *spatial), or a list of them; target (B, 1, *spatial) channel numbers, with their weights as a
    second channel for `border_ce`. Targets larger than the logits (no padding) are cropped to their middle.
    """
    sigmoid = spec.output == "sigmoid"
    parts: dict[str, nn.Module] = {
        "dice_ce": DiceAndCrossEntropy(sigmoid=sigmoid),
        "dice": DiceAndCrossEntropy(sigmoid=sigmoid, cross_entropy=False),
        "border_ce": WeightedCrossEntropy(sigmoid=sigmoid),
    }
    one = parts[run.loss]
    return DeepSupervisionLoss(one) if spec.network.deep_supervision else one


class DiceAndCrossEntropy(nn.Module):
    """Dice over the batch, alone or plus cross-entropy.

    Args:
        sigmoid: whether there is a logit a structure, each for itself, and not one for each class.
        cross_entropy: whether it is added.

    Shapes: logits (B, outputs, *spatial), channel numbers (B, 1, *spatial) → a number.
    """

    def __init__(self, *, sigmoid: bool, cross_entropy: bool = True) -> None:
        super().__init__()
        self.sigmoid, self.cross_entropy = sigmoid, cross_entropy
        self.dice = DiceLoss(sigmoid=sigmoid, softmax=not sigmoid, batch=True)

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        target = centre(target, logits.shape[2:])
        _check(logits, target, 1)
        one_hot = _one_hot(target, logits, sigmoid=self.sigmoid)
        value: torch.Tensor = self.dice(logits, one_hot)
        if self.cross_entropy:
            value = value + _cross_entropy(logits, target, sigmoid=self.sigmoid).mean()
        return value


class WeightedCrossEntropy(nn.Module):
    """The mean of the cross-entropy times each voxel's weight, over the sum of the weights.

    Shapes: logits (B, outputs, *spatial), target (B, 2, *spatial): channel numbers and weights → a number.
    """

    def __init__(self, *, sigmoid: bool) -> None:
        super().__init__()
        self.sigmoid = sigmoid

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        target = centre(target, logits.shape[2:])
        _check(logits, target, 2)
        weight = target[:, 1:]
        entropy = _cross_entropy(logits, target[:, :1], sigmoid=self.sigmoid)
        return (weight * entropy).sum() / weight.sum().clamp(min=torch.finfo(weight.dtype).tiny)


def _cross_entropy(logits: torch.Tensor, target: torch.Tensor, *, sigmoid: bool) -> torch.Tensor:
    """(B, 1, *spatial): of every voxel; with a sigmoid the mean over the structures."""
    if sigmoid:
        one_hot = _one_hot(target, logits, sigmoid=True)
        return functional.binary_cross_entropy_with_logits(logits, one_hot, reduction="none").mean(dim=1, keepdim=True)
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
