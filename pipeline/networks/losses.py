"""The losses that a run can choose by name.

To add a loss, write its module here, add it to `build_loss` and its name to `config.run.LossName`.

A target has the number of each voxel's value in `spec.target_values`, or `IGNORED` for voxels with
the spec's `ignore_label`; no loss depends on these voxels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from monai.losses import DeepSupervisionLoss, DiceFocalLoss, DiceLoss, FocalLoss, TverskyLoss
from torch import nn
from torch.nn import functional

from pipeline.config import Run, Spec
from pipeline.errors import ConfigError, ShapeError
from pipeline.networks.unet import centre_crop

SMOOTH = 1e-5  # added to numerator and denominator of Dice, as in MONAI's DiceLoss by default
IGNORED = -1  # number in the target of voxels that do not count


def build_loss(spec: Spec, run: Run) -> nn.Module:
    """Return the loss that `run.loss` names, for the output of the spec's network in training.

    Args:
        spec: gives the kind of output, regions, the ignored label, deep supervision and the size of
            the ensemble.
        run: gives `loss`, its parameters, `balance` and `class_weights`.

    Shapes:
        output and target → a scalar. The output is logits (B, outputs, *spatial); with deep
        supervision, a list of logits; for an ensemble, a list with the output of each member. The
        target is numbers (B, 1, *spatial), see the module; for `border_ce` (B, 2, *spatial) with
        the weight of each voxel as second channel. If the network has no padding, the target is
        larger than the logits and is cropped to its centre.

    Raises:
        ConfigError: `run.class_weights` names a label that has no channel in the output, or
            `run.balance` is given for sigmoid outputs.
    """
    coding = target_coding(spec, run)
    if run.balance and coding.members is not None:
        raise ConfigError(
            f"run.balance: got {run.balance:g}, expected 0 with output: {spec.output}; each "
            "sigmoid output has a cross-entropy of its own, so name rare ones in run.class_weights"
        )
    loss: nn.Module
    if run.loss == "border_ce":
        loss = WeightedCrossEntropy(coding)
    elif run.loss in ("dice_ce", "dice", "dice_topk"):
        share = {"dice_ce": 1.0, "dice": 0.0, "dice_topk": run.top_k}[run.loss]
        loss = DiceAndCrossEntropy(coding, share=share, balance=run.balance)
    else:
        loss = OneHotLoss(coding, _monai_loss(run, coding))
    if spec.network.deep_supervision:
        loss = DeepSupervisionLoss(loss)
    return EnsembleLoss(loss) if spec.network.ensemble > 1 else loss


def _monai_loss(run: Run, coding: TargetCoding) -> nn.Module:
    """Return MONAI's loss of one-hot targets that `run.loss` names."""
    softmax, weight = coding.members is None, coding.weights
    kind = {"softmax": softmax, "sigmoid": not softmax, "batch": True}
    loss: nn.Module
    if run.loss == "tversky":
        alpha, beta = run.tversky_weights
        loss = TverskyLoss(alpha=alpha, beta=beta, **kind)
    elif run.loss == "dice_focal":
        loss = DiceFocalLoss(gamma=run.focal_gamma, weight=weight, **kind)
    else:
        loss = FocalLoss(gamma=run.focal_gamma, use_softmax=softmax, weight=weight)
    return loss


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TargetCoding:
    """What the numbers of a target mean for the channels of the output.

    Attributes:
        members: (N, outputs) whether number n belongs to the structure of a channel, for sigmoid
            outputs; None for a softmax, whose channels are the numbers.
        ignore: whether targets may have `IGNORED` voxels.
        weights: (outputs,) weight of each channel in the loss; None where all are 1.
    """

    members: torch.Tensor | None = None
    ignore: bool = False
    weights: torch.Tensor | None = None

    def one_hot(self, numbers: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Return which voxels belong to each channel, in the shape and type of the logits.

        Args:
            numbers: (B, 1, *spatial) numbers, none of them ignored.
            logits: (B, outputs, *spatial).
        """
        if self.members is None:
            channels = torch.arange(logits.shape[1], device=numbers.device)
            same = numbers == channels.view(1, -1, *[1] * (numbers.ndim - 2))
            return same.to(logits.dtype)
        members = self.members.to(logits.device, logits.dtype)
        return members.T[:, numbers[:, 0].long()].transpose(0, 1)

    def channel_weights(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the weight of each channel, (outputs,), on the device of the logits."""
        if self.weights is None:
            return torch.ones(logits.shape[1], device=logits.device)
        return self.weights.to(logits.device)


def target_coding(spec: Spec, run: Run) -> TargetCoding:
    """Return what the numbers of a target mean for the outputs of a spec's network.

    Raises:
        ConfigError: `run.class_weights` names a label that has no channel in the output.
    """
    members = None
    if spec.output != "softmax":
        rows = [
            [value in values for values in spec.values_of.values()] for value in spec.target_values
        ]
        members = torch.tensor(rows)
    unknown = [name for name in run.class_weights if name not in spec.outputs]
    if unknown:
        raise ConfigError(
            f"run.class_weights: expected names of outputs ({', '.join(spec.outputs)}), got "
            f"{', '.join(unknown)}"
        )
    weights = None
    if run.class_weights:
        weights = torch.tensor([run.class_weights.get(name, 1.0) for name in spec.outputs])
    return TargetCoding(members=members, ignore=spec.ignore_label is not None, weights=weights)


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


class LabelledVoxelsLoss(nn.Module):
    """Base of the losses: crops the target to the logits and leaves out ignored voxels.

    Args:
        coding: what the numbers of the target mean.

    Shapes:
        logits (B, outputs, *spatial), numbers (B, 1, *spatial) → a scalar; 0 if all voxels are
        ignored.
    """

    def __init__(self, coding: TargetCoding) -> None:
        super().__init__()
        self.coding = coding

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        target = centre_crop(target, logits)
        _check_target(logits, target, channels=1)
        if self.coding.ignore:
            labelled = target[:, 0] != IGNORED
            # a row of labelled voxels in place of the batch's spatial axes: every loss here sums
            # over both of them together
            logits = logits.movedim(1, -1)[labelled].T[None]
            target = target[:, 0][labelled][None, None]
            if not target.numel():
                return logits.sum()
        return self.value(logits, target)

    def value(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return the loss of voxels that are all labelled."""
        raise NotImplementedError


class OneHotLoss(LabelledVoxelsLoss):
    """A loss of MONAI, which takes logits and a one-hot target of the same shape.

    Args:
        coding: what the numbers of the target mean.
        loss: MONAI's loss.
    """

    def __init__(self, coding: TargetCoding, loss: Callable[..., torch.Tensor]) -> None:
        super().__init__(coding)
        self.loss = loss

    def value(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return the loss of voxels that are all labelled."""
        if isinstance(self.loss, nn.Module):
            self.loss.to(logits.device)  # its weights of classes are buffers
        return self.loss(logits.float(), self.coding.one_hot(target, logits).float())


class DiceAndCrossEntropy(LabelledVoxelsLoss):
    """Dice loss over the whole batch, with or without cross-entropy.

    Args:
        coding: what the numbers of the target mean; its weights apply to Dice and cross-entropy of
            each channel, as in MONAI's `DiceCELoss(weight=…)`.
        share: fraction of the voxels, those with the highest cross-entropy, that its mean is taken
            over; 0 leaves the cross-entropy out.
        balance: exponent that gives rare classes more weight in the cross-entropy of a softmax. A
            voxel's weight is the fraction of the batch's voxels that have its class, to the power
            of -balance: with 0 all voxels have the same weight, with 1 all classes. For a share of
            1 only.
    """

    def __init__(self, coding: TargetCoding, *, share: float = 1.0, balance: float = 0.0) -> None:
        super().__init__(coding)
        self.share, self.balance = share, balance
        sigmoid = coding.members is not None
        self.dice = DiceLoss(
            sigmoid=sigmoid, softmax=not sigmoid, batch=True, weight=coding.weights
        )

    def value(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return the loss of voxels that are all labelled."""
        value: torch.Tensor
        if self.share == 1 and self.coding.members is None:
            weights = None if self.coding.weights is None else self.coding.weights.to(logits.device)
            value = SoftmaxDiceCrossEntropy.apply(  # type: ignore[no-untyped-call]
                logits, target[:, 0].long(), self.balance, weights
            )
            return value
        self.dice.to(logits.device)  # its weights of classes are a buffer
        value = self.dice(logits, self.coding.one_hot(target, logits))
        if not self.share:
            return value
        each, weight = _voxel_cross_entropy(logits, target, self.coding)
        if self.share == 1:
            return value + (each * weight).sum() / weight.sum()
        each = (each * weight).flatten()
        hardest = each.topk(max(1, round(self.share * each.numel())), sorted=False).values
        return value + hardest.mean()


class SoftmaxDiceCrossEntropy(torch.autograd.Function):
    """MONAI's `DiceCELoss(softmax=True, to_onehot_y=True, batch=True)` with an explicit gradient.

    It is faster than automatic differentiation, because it reads and writes tensors of classes ×
    voxels fewer times; with many classes this takes much of a training step on a CPU. With a
    balance or weights of classes, the cross-entropy is a weighted mean over voxels, as in
    `torch.nn.functional.cross_entropy(weight=…)`; such weights also multiply the Dice loss of each
    class, as in MONAI's `DiceCELoss(weight=…)`.

    Shapes:
        logits (B, C, *spatial), channel numbers (B, *spatial) int64, balance (a number, see
        `DiceAndCrossEntropy`), weights (C,) or None → a scalar.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        target: torch.Tensor,
        balance: float = 0.0,
        weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the loss, and save the tensors that `backward` needs in `ctx`."""
        classes = logits.shape[1]
        labels = target.reshape(-1, 1)  # (voxels, 1)
        log_probability = torch.log_softmax(
            logits.movedim(1, -1).reshape(-1, classes).float(), dim=1
        )  # (voxels, classes)
        counts = torch.bincount(labels[:, 0], minlength=classes)
        class_weight = (counts.clamp(min=1) / counts.sum()).float() ** -balance
        if weights is not None:
            class_weight = class_weight * weights
        # (voxels,), normalised to a sum of 1; all 0 if no voxel has a weight
        total = (class_weight * counts).sum().clamp(min=torch.finfo().tiny)
        voxel_weight = (class_weight / total)[labels[:, 0]]
        cross_entropy = -(log_probability.gather(1, labels)[:, 0] * voxel_weight).sum()
        probability = log_probability.exp_()  # in place: the largest tensor is held only once
        target_probability = probability.gather(1, labels)[:, 0]
        intersection = torch.zeros(classes, device=probability.device)
        intersection.index_add_(0, labels[:, 0], target_probability)
        denominator = probability.sum(dim=0) + counts + SMOOTH
        # weight of each class in the Dice loss
        dice_weight = torch.ones_like(denominator) if weights is None else weights.float()
        ctx.save_for_backward(
            probability,
            labels,
            target_probability,
            intersection,
            denominator,
            voxel_weight,
            dice_weight,
        )
        ctx.shape, ctx.dtype = logits.shape, logits.dtype
        dice = 1 - (2 * intersection + SMOOTH) / denominator
        return cross_entropy + (dice * dice_weight).mean()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Return the gradient with respect to the logits."""
        (
            probability,
            labels,
            target_probability,
            intersection,
            denominator,
            voxel_weight,
            dice_weight,
        ) = ctx.saved_tensors
        classes = probability.shape[1]
        # Derivative of the Dice loss with respect to the probability p of a class in a voxel: p is
        # part of the denominator in all voxels, of the intersection only in the voxels of its class
        by_denominator = (2 * intersection + SMOOTH) / denominator**2 / classes * dice_weight
        by_intersection = -2 / denominator / classes * dice_weight
        # Part that only the target class of each voxel has. The derivative of the cross-entropy by
        # the logits is weight · (probability - one-hot)
        at_target = target_probability * by_intersection[labels[:, 0]]
        # Chain rule through the softmax: d/dlogit = p · (d/dp - sum over classes of p · d/dp)
        mean = (probability @ by_denominator + at_target - voxel_weight)[:, None]
        gradient = (by_denominator[None] - mean).mul_(probability)
        gradient.scatter_add_(1, labels, (at_target - voxel_weight)[:, None])
        shape = (ctx.shape[0], *ctx.shape[2:], ctx.shape[1])
        logits = gradient.mul_(grads[0]).reshape(shape).movedim(-1, 1).to(ctx.dtype)
        return logits, None, None, None


class WeightedCrossEntropy(nn.Module):
    """Cross-entropy, averaged over voxels with a weight for each voxel.

    Args:
        coding: what the numbers of the target mean.

    Shapes:
        logits (B, outputs, *spatial), target (B, 2, *spatial) with number and weight of each voxel
        → a scalar. Ignored voxels have the weight 0.
    """

    def __init__(self, coding: TargetCoding) -> None:
        super().__init__()
        self.coding = coding

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        target = centre_crop(target, logits)
        _check_target(logits, target, channels=2)
        labels, weight = target[:, :1], target[:, 1:]
        if self.coding.ignore:
            weight = weight * (labels != IGNORED)
            labels = labels.clamp(min=0)
        each, _ = _voxel_cross_entropy(logits, labels, self.coding)
        # a batch in which all weights are 0 has the loss 0, not nan
        return (weight * each.mean(dim=1, keepdim=True)).sum() / weight.sum().clamp(
            min=torch.finfo(weight.dtype).tiny
        )


def _voxel_cross_entropy(
    logits: torch.Tensor, target: torch.Tensor, coding: TargetCoding
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the cross-entropy of each voxel and its weight by class.

    Args:
        logits: (B, outputs, *spatial) logits.
        target: (B, 1, *spatial) numbers, none of them ignored.
        coding: what the numbers mean.

    Returns:
        Both (B, 1, *spatial) for a softmax, and (B, outputs, *spatial), the binary cross-entropy of
        each structure, for sigmoids.
    """
    weights = coding.channel_weights(logits)
    if coding.members is None:
        numbers = target[:, 0].long()
        each = functional.cross_entropy(logits, numbers, reduction="none")
        return each[:, None], weights[numbers][:, None]
    one_hot = coding.one_hot(target, logits)
    each = functional.binary_cross_entropy_with_logits(logits, one_hot, reduction="none")
    return each, weights.view(1, -1, *[1] * (logits.ndim - 2)).expand_as(each)


def _check_target(logits: torch.Tensor, target: torch.Tensor, *, channels: int) -> None:
    expected = (logits.shape[0], channels, *logits.shape[2:])
    if target.shape != expected:
        raise ShapeError(
            f"target has shape {tuple(target.shape)}, expected {tuple(expected)} for logits of "
            f"{tuple(logits.shape)}; does the run's loss fit its transforms?"
        )
