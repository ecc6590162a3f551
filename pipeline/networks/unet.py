"""The U-Net, in 2D or 3D by one argument.

References:
    Ronneberger, Fischer, Brox: U-Net. MICCAI 2015, doi:10.1007/978-3-319-24574-4_28.
    Çiçek et al.: 3D U-Net. MICCAI 2016, doi:10.1007/978-3-319-46723-8_49.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from monai.networks.layers import Act, Conv, Dropout, Norm, Pool
from torch import nn
from torch.nn import functional

from pipeline.config import Spec, nearest_valid_sizes, output_size
from pipeline.errors import ShapeError

TINY = 1e-12  # no probability is taken for less


class ConvBlock(nn.Module):
    """Two 3×3(×3) convolutions, each with its norm and activation; the sum with a projected input when residual.

    Shapes: (B, in_channels, *spatial) → (B, out_channels, *spatial), four voxels fewer along each axis without padding.
    """

    def __init__(
        self, dims: int, in_channels: int, out_channels: int, *, options: BlockOptions
    ) -> None:
        super().__init__()
        conv = Conv[Conv.CONV, dims]
        bias = options.norm is None
        layers: list[nn.Module] = []
        pad = 1 if options.padding else 0
        for channels in (in_channels, out_channels):
            layers += [
                conv(channels, out_channels, kernel_size=3, padding=pad, bias=bias),
                *_norm(dims, out_channels, options),
            ]
            layers += [_activation(options)] if len(layers) < 3 or not options.residual else []
        self.body = nn.Sequential(*layers)
        self.padding = options.padding
        self.skip = None
        if options.residual:
            self.skip = (
                conv(in_channels, out_channels, kernel_size=1)
                if in_channels != out_channels
                else nn.Identity()
            )
        self.last = _activation(options) if options.residual else nn.Identity()
        self.dropout = (
            Dropout[Dropout.DROPOUT, dims](options.dropout) if options.dropout else nn.Identity()
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.body(x)
        if self.skip is not None:
            y = y + (self.skip(x) if self.padding else centre_crop(self.skip(x), y.shape[2:]))
        return self.dropout(self.last(y))  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class BlockOptions:
    """What all blocks of one network share."""

    norm: str | None
    activation: str
    residual: bool
    dropout: float
    padding: bool


class InstanceNorm(nn.GroupNorm):
    """Each channel of each sample to mean 0 and variance 1, then scaled and shifted: a group norm of one channel a group.

    While a CPU trains, each sample goes through torch's batch norm: the same values, and in channels_last order a way back that
    is 10 times faster than the group norm's in float32, 35 times in bfloat16.

    Args:
        channels: of the input.

    Shapes: (B, channels, *spatial) → the same.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not self.training or input.device.type != "cpu":
            return super().forward(input)
        samples = [
            functional.batch_norm(
                sample, None, None, self.weight, self.bias, training=True, eps=self.eps
            )
            for sample in torch.split(input, 1)
        ]
        return samples[0] if len(samples) == 1 else torch.cat(samples)


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
        norm: None, `batch`, or `instance` (`InstanceNorm`).
        activation: any of MONAI's `Act`, by name.
        residual: add each block's input to its output.
        dropout: probability of a channel-wise dropout after each block.
        contraction_dropout: probability of a voxel-wise dropout at the end of the contracting path: after the last block
            above the bottleneck and after the bottleneck.
        deep_supervision: how many lower decoder levels give logits of their own while training.
        padding: whether convolutions are padded; without, skips are cropped to their middle and the output is smaller than
            the input by a fixed margin (`pipeline.sizes`), of which every voxel saw real surroundings.

    Shapes:
        (B, in_channels, *spatial) → (B, out_channels, *spatial), every size a multiple of the product of the strides along
        its axis; without padding (B, out_channels, *smaller), for sizes that fit every pooling (572 → 388). While training
        with deep supervision: a list, full size first, then each lower level at its own size.

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
        contraction_dropout: float = 0.0,
        deep_supervision: int = 0,
        padding: bool = True,
    ) -> None:
        super().__init__()
        if spatial_dims not in (2, 3):
            raise ShapeError(f"spatial_dims: expected 2 or 3, got {spatial_dims}")
        levels = len(features) - 1
        self.in_channels, self.padding = in_channels, padding
        self.strides = [
            (s,) * spatial_dims if isinstance(s, int) else tuple(s)
            for s in (strides or [2] * levels)
        ]
        if levels < 1 or len(self.strides) != levels or not 0 <= deep_supervision < levels:
            raise ShapeError(
                f"features {tuple(features)}, strides {self.strides}, deep_supervision {deep_supervision}: expected at least "
                "two features, one stride fewer than features, and fewer deep outputs than strides"
            )
        options = BlockOptions(norm, activation, residual, dropout, padding)
        ins = [in_channels, *features[:-2]]
        self.encoder = nn.ModuleList(
            ConvBlock(spatial_dims, i, o, options=options)
            for i, o in zip(ins, features[:-1], strict=True)
        )
        self.pool = nn.ModuleList(Pool[Pool.MAX, spatial_dims](s, s) for s in self.strides)
        self.bottleneck = ConvBlock(spatial_dims, features[-2], features[-1], options=options)
        self.contraction_dropout = (
            nn.Dropout(contraction_dropout) if contraction_dropout else nn.Identity()
        )
        conv, up = Conv[Conv.CONV, spatial_dims], Conv[Conv.CONVTRANS, spatial_dims]
        self.up = nn.ModuleList(
            up(features[i + 1], features[i], self.strides[i], self.strides[i])
            for i in range(levels)
        )
        self.decoder = nn.ModuleList(
            ConvBlock(spatial_dims, 2 * f, f, options=options) for f in features[:-1]
        )
        self.output = conv(features[0], out_channels, kernel_size=1)
        self.deep_outputs = nn.ModuleList(
            conv(features[i + 1], out_channels, kernel_size=1) for i in range(deep_supervision)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        # a trace would record the sizes as constants, and warn
        if not torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            self._check(x)
        skips = []
        for level, (block, pool) in enumerate(zip(self.encoder, self.pool, strict=True), start=1):
            x = block(x)
            x = self.contraction_dropout(x) if level == len(self.encoder) else x
            skips.append(x)
            x = pool(x)
        x = self.contraction_dropout(self.bottleneck(x))
        levels = []
        for up, block, skip in zip(
            reversed(self.up), reversed(self.decoder), reversed(skips), strict=True
        ):
            x = up(x)
            x = block(
                torch.cat([x, skip if self.padding else centre_crop(skip, x.shape[2:])], dim=1)
            )
            levels.append(x)
        logits = self.output(x)
        if not (self.training and len(self.deep_outputs)):
            return logits  # type: ignore[no-any-return]
        return [
            logits,
            *(head(level) for head, level in zip(self.deep_outputs, levels[-2::-1], strict=False)),
        ]

    def _check(self, x: torch.Tensor) -> None:
        axes = [[s[axis] for s in self.strides] for axis in range(len(self.strides[0]))]
        shape = [int(n) for n in x.shape]
        if len(shape) != len(axes) + 2 or shape[1] != self.in_channels:
            expected = ", ".join(f"{prod(strides)}·n" for strides in axes)
            raise ShapeError(
                f"input has shape {tuple(shape)}, expected (B, {self.in_channels}, {expected})"
            )
        for axis, (size, strides) in enumerate(zip(shape[2:], axes, strict=True)):
            if output_size(size, strides, padding=self.padding) is None:
                rule = (
                    f"a multiple of {prod(strides)} (the product of the strides there)"
                    if self.padding
                    else "a size that fits every pooling"
                )
                near = nearest_valid_sizes(size, strides, padding=self.padding)
                raise ShapeError(
                    f"input has {size} voxels along spatial axis {axis}, expected {rule}: pad or crop it to {near}, or use "
                    "pipeline.window.inferer, which pads"
                )


def centre_crop(x: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """The middle of x, (B, C, *spatial) → (B, C, *size); x itself where the sizes agree."""
    for axis, n in enumerate(size, start=2):
        if x.shape[axis] != n:
            x = x.narrow(axis, (x.shape[axis] - n) // 2, n)
    return x


class Ensemble(nn.Module):
    """U-Nets of one shape, run one after the other; what they say is averaged.

    They begin with different weights and learn from the same batches, or are those that the folds of a cross-validation left.

    Args:
        members: the networks.
        sigmoid: whether each logit stands for itself, instead of a softmax over all.

    Shapes: as one of them; the logits are those of the mean probability. While training: a list of what each of them gives.
    """

    def __init__(self, members: Sequence[UNet], *, sigmoid: bool) -> None:
        super().__init__()
        self.members, self.sigmoid = nn.ModuleList(members), sigmoid

    def forward(self, x: torch.Tensor) -> torch.Tensor | list[Any]:
        if self.training:
            return [member(x) for member in self.members]
        mean: Any = 0.0
        for member in self.members:
            logits = member(x).float()
            mean = mean + (
                torch.sigmoid(logits) if self.sigmoid else torch.softmax(logits, dim=1)
            ) / len(self.members)
        return torch.logit(mean, eps=TINY) if self.sigmoid else torch.log(mean.clamp(min=TINY))


def member_states(state: Mapping[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """The state dicts of an ensemble's networks, from the ensemble's; of a lone network its own."""
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in state.items():
        head, _, rest = name.partition(".")
        number, _, rest = rest.partition(".") if head == "members" else ("0", "", name)
        parts.setdefault(number, {})[rest] = tensor
    return list(parts.values())


def channels_last(network: nn.Module) -> nn.Module:
    """The network with its kernels in channels_last order, in which convolutions are fastest; in place."""
    flat = not any(isinstance(module, nn.Conv3d) for module in network.modules())
    order = torch.channels_last if flat else torch.channels_last_3d
    return network.to(memory_format=order)  # type: ignore[call-overload, no-any-return]


def build_network(spec: Spec) -> nn.Module:
    """The network that a spec names, with random weights: a U-Net, or an ensemble of them."""
    if spec.network.ensemble > 1:
        return Ensemble(
            [build_unet(spec) for _ in range(spec.network.ensemble)],
            sigmoid=spec.output == "sigmoid",
        )
    return build_unet(spec)


def build_unet(spec: Spec) -> UNet:
    """One U-Net of the shape that a spec names, with random weights."""
    n = spec.network
    return UNet(
        spec.spatial_dims,
        len(spec.channels),
        len(spec.outputs),
        n.features,
        spec.strides,
        norm=n.norm,
        activation=n.activation,
        residual=n.residual,
        dropout=n.dropout,
        contraction_dropout=n.contraction_dropout,
        deep_supervision=n.deep_supervision,
        padding=n.padding,
    )


def _norm(dims: int, channels: int, options: BlockOptions) -> list[nn.Module]:
    if options.norm is None:
        return []
    if options.norm == "batch":
        return [Norm[Norm.BATCH, dims](channels)]
    if options.norm == "instance":
        return [InstanceNorm(channels)]
    raise ShapeError(f"norm: expected None, 'batch' or 'instance', got {options.norm!r}")


def _activation(options: BlockOptions) -> nn.Module:
    kind = Act[options.activation]
    return kind(inplace=True) if kind in (nn.ReLU, nn.LeakyReLU, nn.SiLU) else kind()  # type: ignore[no-any-return]
