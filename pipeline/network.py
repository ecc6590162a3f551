"""The U-Net, in 2D or 3D by one argument.

References:
    Ronneberger, Fischer, Brox: U-Net. MICCAI 2015, doi:10.1007/978-3-319-24574-4_28.
    Çiçek et al.: 3D U-Net. MICCAI 2016, doi:10.1007/978-3-319-46723-8_49.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from monai.networks.layers import Act, Conv, Dropout, Norm, Pool
from torch import nn

from pipeline.errors import ShapeError
from pipeline.spec import Spec


class Block(nn.Module):
    """Two 3×3(×3) convolutions, each with its norm and activation; the sum with a projected input when residual.

    Shapes: (B, in_channels, *spatial) → (B, out_channels, *spatial).
    """

    def __init__(self, dims: int, in_channels: int, out_channels: int, *, options: Options) -> None:
        super().__init__()
        conv = Conv[Conv.CONV, dims]
        bias = options.norm is None
        layers: list[nn.Module] = []
        for channels in (in_channels, out_channels):
            layers += [conv(channels, out_channels, kernel_size=3, padding=1, bias=bias), *_norm(dims, out_channels, options)]
            layers += [_activation(options)] if len(layers) < 3 or not options.residual else []
        self.body = nn.Sequential(*layers)
        self.skip = None
        if options.residual:
            self.skip = conv(in_channels, out_channels, kernel_size=1) if in_channels != out_channels else nn.Identity()
        self.last = _activation(options) if options.residual else nn.Identity()
        self.dropout = Dropout[Dropout.DROPOUT, dims](options.dropout) if options.dropout else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.body(x)
        if self.skip is not None:
            y = y + self.skip(x)
        return self.dropout(self.last(y))  # type: ignore[no-any-return]


class Options:
    """What all blocks of one network share."""

    def __init__(self, norm: str | None, activation: str, residual: bool, dropout: float) -> None:
        self.norm, self.activation, self.residual, self.dropout = norm, activation, residual, dropout


class UNet(nn.Module):
    """Encoder, bottleneck and decoder with skip connections, in 2D or 3D.

    Each encoder level is a double convolution and a max pooling; the decoder goes back up by transposed convolutions whose
    kernel is the stride, concatenates (upsampled first, then the skip) and convolves twice; a 1×1(×1) convolution ends it.

    Args:
        spatial_dims: 2 (Conv2d) or 3 (Conv3d).
        in_channels: channels of the image.
        out_channels: classes, background included (or 1 for a sigmoid output).
        features: channels a level, top first; the last is the bottleneck.
        strides: one a pooling, so one fewer than features: a number, or one number a spatial axis (2, 2, 1); 2 by default.
        norm: None, `batch`, or `instance` (as a group norm of one channel a group: the same values, faster on a CPU).
        activation: any of MONAI's `Act`, by name.
        residual: add each block's input to its output.
        dropout: probability of a channel-wise dropout after each block.
        deep_supervision: how many lower decoder levels give logits of their own while training.

    Shapes:
        (B, in_channels, *spatial) → (B, out_channels, *spatial), every size a multiple of the product of the strides along
        its axis. While training with deep supervision: a list, full size first, then each lower level at its own size.

    Raises:
        ShapeError: an input size that the strides do not divide; the message names the sizes that work.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        features: Sequence[int],
        strides: Sequence[int | Sequence[int]] | None = None,
        *,
        norm: str | None = None,
        activation: str = "relu",
        residual: bool = False,
        dropout: float = 0.0,
        deep_supervision: int = 0,
    ) -> None:
        super().__init__()
        if spatial_dims not in (2, 3):
            raise ShapeError(f"spatial_dims: expected 2 or 3, got {spatial_dims}")
        levels = len(features) - 1
        self.in_channels = in_channels
        self.strides = [(s,) * spatial_dims if isinstance(s, int) else tuple(s) for s in (strides or [2] * levels)]
        if levels < 1 or len(self.strides) != levels or not 0 <= deep_supervision < levels:
            raise ShapeError(
                f"features {tuple(features)}, strides {self.strides}, deep_supervision {deep_supervision}: expected at least "
                "two features, one stride fewer than features, and fewer deep outputs than strides"
            )
        options = Options(norm, activation, residual, dropout)
        ins = [in_channels, *features[:-2]]
        self.encoder = nn.ModuleList(
            Block(spatial_dims, i, o, options=options) for i, o in zip(ins, features[:-1], strict=True)
        )
        self.pool = nn.ModuleList(Pool[Pool.MAX, spatial_dims](s, s) for s in self.strides)
        self.bottleneck = Block(spatial_dims, features[-2], features[-1], options=options)
        up = Conv[Conv.CONVTRANS, spatial_dims]
        self.up = nn.ModuleList(up(features[i + 1], features[i], self.strides[i], self.strides[i]) for i in range(levels))
        self.decoder = nn.ModuleList(Block(spatial_dims, 2 * f, f, options=options) for f in features[:-1])
        conv = Conv[Conv.CONV, spatial_dims]
        self.output = conv(features[0], out_channels, kernel_size=1)
        self.deep_outputs = nn.ModuleList(conv(features[i + 1], out_channels, kernel_size=1) for i in range(deep_supervision))

    def forward(self, x: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        # a trace would record the sizes as constants, and warn
        if not torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            self._check(x)
        skips = []
        for block, pool in zip(self.encoder, self.pool, strict=True):
            x = block(x)
            skips.append(x)
            x = pool(x)
        x = self.bottleneck(x)
        levels = []
        for up, block, skip in zip(reversed(self.up), reversed(self.decoder), reversed(skips), strict=True):
            x = block(torch.cat([up(x), skip], dim=1))
            levels.append(x)
        logits = self.output(x)
        if not (self.training and len(self.deep_outputs)):
            return logits  # type: ignore[no-any-return]
        return [logits, *(head(level) for head, level in zip(self.deep_outputs, levels[-2::-1], strict=False))]

    def _check(self, x: torch.Tensor) -> None:
        steps = [prod(s[axis] for s in self.strides) for axis in range(len(self.strides[0]))]
        shape = [int(n) for n in x.shape]
        if len(shape) != len(steps) + 2 or shape[1] != self.in_channels:
            expected = ", ".join(f"{step}·n" for step in steps)
            raise ShapeError(f"input has shape {tuple(shape)}, expected (B, {self.in_channels}, {expected})")
        for axis, (size, step) in enumerate(zip(shape[2:], steps, strict=True)):
            if size % step or size == 0:
                near = f"{step * (size // step)} or {step * (size // step + 1)}" if size >= step else str(step)
                raise ShapeError(
                    f"input has {size} voxels along spatial axis {axis}, expected a multiple of {step} (the product of the "
                    f"strides there): pad or crop it to {near}, or use pipeline.window.inferer, which pads"
                )


def from_spec(spec: Spec) -> UNet:
    """The network that a spec names, with random weights."""
    n = spec.network
    return UNet(
        spec.spatial_dims,
        len(spec.channels),
        len(spec.labels),
        n.features,
        spec.strides,
        norm=n.norm,
        activation=n.activation,
        residual=n.residual,
        dropout=n.dropout,
        deep_supervision=n.deep_supervision,
    )


def _norm(dims: int, channels: int, options: Options) -> list[nn.Module]:
    if options.norm is None:
        return []
    if options.norm == "batch":
        return [Norm[Norm.BATCH, dims](channels)]
    if options.norm == "instance":
        return [Norm[Norm.GROUP, dims](channels, channels)]
    raise ShapeError(f"norm: expected None, 'batch' or 'instance', got {options.norm!r}")


def _activation(options: Options) -> nn.Module:
    kind = Act[options.activation]
    return kind(inplace=True) if kind in (nn.ReLU, nn.LeakyReLU, nn.SiLU) else kind()  # type: ignore[no-any-return]
