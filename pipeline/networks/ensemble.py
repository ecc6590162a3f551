"""An ensemble of U-Nets that is trained, saved and run as one network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from pipeline.networks.unet import is_scripting

MIN_PROBABILITY = 1e-12  # lower bound of a mean probability, so that its logarithm is finite


class Ensemble(nn.Module):
    """U-Nets of the same architecture, whose probabilities are averaged.

    The members either are trained together, on the same batches from different initial weights, or
    come from the folds of a cross-validation.

    `torch.jit.script` and `torch.jit.trace` compile an ensemble in evaluation mode. A scripted
    ensemble always returns the average and cannot be trained.

    Args:
        members: the U-Nets.
        sigmoid: whether each channel is a structure of its own (probability by sigmoid), instead of
            one of several classes (softmax over the channels).
        average_logits: whether the members' logits are averaged instead of their probabilities.

    Shapes:
        (B, in_channels, *spatial) → (B, out_channels, *output), logits whose sigmoid or softmax is
        the members' mean probability, or the members' mean logits. In training mode: a list with
        the output of each member.
    """

    def __init__(
        self, members: Sequence[nn.Module], *, sigmoid: bool, average_logits: bool = False
    ) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.sigmoid, self.average_logits = sigmoid, average_logits
        self.min_probability = MIN_PROBABILITY  # TorchScript does not see a module's constants

    def forward(self, x: torch.Tensor) -> torch.Tensor | list[torch.Tensor | list[torch.Tensor]]:
        if not is_scripting() and self.training:
            return [member(x) for member in self.members]
        mean = torch.zeros((), device=x.device)
        for member in self.members:
            logits = member(x)
            # a member in evaluation mode returns a tensor; the assertion tells TorchScript the type
            assert isinstance(logits, torch.Tensor)
            logits = logits.float()
            mean = mean + self._averaged(logits) / len(self.members)
        if self.average_logits:
            return mean
        # logits whose sigmoid or softmax is the mean probability again
        if self.sigmoid:
            return torch.logit(mean, eps=self.min_probability)
        return torch.log(mean.clamp(min=self.min_probability))

    def _averaged(self, logits: torch.Tensor) -> torch.Tensor:
        """Return what is averaged over the members: logits or probabilities."""
        if self.average_logits:
            return logits
        return torch.sigmoid(logits) if self.sigmoid else torch.softmax(logits, dim=1)


def member_states(state: Mapping[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """Return the state dict of each member of an ensemble; of a single network, its own only.

    Args:
        state: state dict of an `Ensemble`, or of a single network.
    """
    members: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in state.items():
        # entries of an ensemble are named members.<number>.<name in the U-Net>
        prefix, _, rest = name.partition(".")
        number, own_name = "0", name
        if prefix == "members":
            number, _, own_name = rest.partition(".")
        members.setdefault(number, {})[own_name] = tensor
    return list(members.values())
