"""Plain implementations of published U-Nets to compare ours to; names as in their checkpoints."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn


def _parts(dims: int) -> tuple[type[nn.Module], type[nn.Module], type[nn.Module], type[nn.Module]]:
    if dims == 2:
        return nn.Conv2d, nn.ConvTranspose2d, nn.MaxPool2d, nn.BatchNorm2d
    return nn.Conv3d, nn.ConvTranspose3d, nn.MaxPool3d, nn.BatchNorm3d


class Published(nn.Module):
    """Four poolings; a subclass gives the blocks. The upsampled map is concatenated first."""

    last = "output"

    def __init__(
        self, dims: int = 2, in_channels: int = 3, out_channels: int = 1, features: int = 32
    ) -> None:
        super().__init__()
        conv, up, pool, _ = _parts(dims)
        widths = [in_channels, *(features * 2**k for k in range(5))]
        for level in range(1, 5):
            self.add_module(
                f"encoder{level}", self.block(dims, widths[level - 1], widths[level], f"enc{level}")
            )
            self.add_module(
                f"upconv{level}", up(widths[level + 1], widths[level], kernel_size=2, stride=2)
            )
            self.add_module(
                f"decoder{level}", self.block(dims, 2 * widths[level], widths[level], f"dec{level}")
            )
        self.bottleneck = self.block(dims, widths[4], widths[5], "bottleneck")
        self.add_module(self.last, conv(features, out_channels, kernel_size=1))
        self.pool = pool(kernel_size=2, stride=2)

    def block(self, dims: int, ins: int, outs: int, name: str) -> nn.Sequential:
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skips = []
        for level in range(1, 5):
            x = getattr(self, f"encoder{level}")(x)
            skips.append(x)
            x = self.pool(x)
        x = self.bottleneck(x)
        for level in range(4, 0, -1):
            x = torch.cat((getattr(self, f"upconv{level}")(x), skips[level - 1]), dim=1)
            x = getattr(self, f"decoder{level}")(x)
        logits: torch.Tensor = getattr(self, self.last)(x)
        return logits


class Tutorial(Published):
    """The tutorial U-Net: convolutions with bias and ReLUs, which are numbered."""

    def block(self, dims: int, ins: int, outs: int, name: str) -> nn.Sequential:
        conv = _parts(dims)[0]
        return nn.Sequential(
            conv(ins, outs, 3, padding=1), nn.ReLU(), conv(outs, outs, 3, padding=1), nn.ReLU()
        )


class Buda(Published):
    """The U-Net of brain-segmentation-pytorch: no bias, batch norm, a sigmoid at the end."""

    last = "conv"

    def block(self, dims: int, ins: int, outs: int, name: str) -> nn.Sequential:
        conv, _, _, norm = _parts(dims)
        parts: list[tuple[str, nn.Module]] = []
        for i, channels in ((1, ins), (2, outs)):
            parts += [
                (f"{name}conv{i}", conv(channels, outs, 3, padding=1, bias=False)),
                (f"{name}norm{i}", norm(outs)),
                (f"{name}relu{i}", nn.ReLU()),
            ]
        return nn.Sequential(OrderedDict(parts))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(super().forward(x))


def trained(model: nn.Module) -> nn.Module:
    """Return the model for inference, with norm statistics that are not the initial ones."""
    generator = torch.Generator().manual_seed(3)
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    return model.eval()
