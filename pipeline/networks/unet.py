"""The U-Net, in 2D or 3D.

References:
    Ronneberger, Fischer, Brox: U-Net. MICCAI 2015, doi:10.1007/978-3-319-24574-4_28.
    Çiçek et al.: 3D U-Net. MICCAI 2016, doi:10.1007/978-3-319-46723-8_49.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from monai.networks.layers import Act, Conv, Dropout, Norm, Pool
from torch import nn
from torch.nn import functional

from pipeline.config import nearest_valid_sizes, output_size
from pipeline.errors import ShapeError

# `forward` methods here must compile with torch.jit.script, which `python -m monai.bundle
# ckpt_export` uses. TorchScript takes comments that start with `# type:` for its own annotations: no
# `forward` may have one, and annotated assignments give results their type instead.
is_scripting = torch.jit.is_scripting  # type: ignore[attr-defined]


class InstanceNorm(nn.GroupNorm):
    """Instance normalisation with a learned scale and shift per channel.

    It is a group norm with one channel per group. In training, torch's batch norm is applied to
    each sample instead. The values are the same; for channels_last tensors on a CPU, its backward
    pass is 10 times faster than that of group norm in float32, and 35 times in bfloat16. On a GPU,
    autocast leaves its output in bfloat16, and a step of four samples takes two thirds of the
    memory and three quarters of the time.

    Args:
        channels: number of channels of the input.

    Shapes:
        (B, channels, *spatial) → (B, channels, *spatial).
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not self.training or input.device.type not in ("cpu", "cuda"):
            return functional.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)
        samples = [
            functional.batch_norm(
                sample, None, None, self.weight, self.bias, training=True, eps=self.eps
            )
            for sample in torch.split(input, 1)
        ]
        return samples[0] if len(samples) == 1 else torch.cat(samples)


class ConvBlock(nn.Module):
    """Two convolutions of the same kernel size, each followed by a norm and an activation.

    A residual block adds its input before the second activation, through a 1×1(×1) convolution if
    the number of channels changes.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the input.
        out_channels: channels after each of the two convolutions.
        norm: None, `batch` or `instance`.
        activation: a name of MONAI's `Act`.
        residual: whether the input is added to the output.
        dropout: probability of dropping a whole channel of the output.
        padding: whether the convolutions are padded.
        kernel: kernel size of both convolutions, an odd number, or one number per spatial axis.

    Shapes:
        (B, in_channels, *spatial) → (B, out_channels, *spatial); without padding and with a kernel
        of 3 every spatial size is 4 voxels smaller.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        norm: str | None,
        activation: str,
        residual: bool,
        dropout: float,
        padding: bool,
        kernel: int | Sequence[int] = 3,
    ) -> None:
        super().__init__()
        sizes = (kernel,) * spatial_dims if isinstance(kernel, int) else tuple(kernel)
        conv = Conv[Conv.CONV, spatial_dims]
        # a norm subtracts the mean, so a bias of the convolution before it would have no effect
        common: dict[str, Any] = {
            "kernel_size": sizes,
            "padding": tuple(size // 2 if padding else 0 for size in sizes),
            "bias": norm is None,
        }
        layers = [
            conv(in_channels, out_channels, **common),
            *norm_layers(norm, spatial_dims, out_channels),
            activation_layer(activation),
            conv(out_channels, out_channels, **common),
            *norm_layers(norm, spatial_dims, out_channels),
        ]
        if not residual:
            layers.append(activation_layer(activation))
        self.body = nn.Sequential(*layers)
        self.padding = padding
        self.skip: nn.Module | None = None
        if residual and in_channels != out_channels:
            self.skip = conv(in_channels, out_channels, kernel_size=1)
        elif residual:
            self.skip = nn.Identity()
        self.last = activation_layer(activation) if residual else nn.Identity()
        self.dropout = Dropout[Dropout.DROPOUT, spatial_dims](dropout) if dropout else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.body(x)
        if self.skip is not None:
            residual: torch.Tensor = self.skip(x)
            y = y + (residual if self.padding else centre_crop(residual, y))
        output: torch.Tensor = self.dropout(self.last(y))
        return output


class UNetDecoder(nn.Module):
    """The decoder of a U-Net: upsampling, skip connections, and logits of some levels.

    A subclass makes the layers, because their order decides which initial weights follow from a
    seed.

    Attributes:
        padding: whether convolutions are padded; otherwise skip connections are cropped.
        up: upsampling to each level, top first.
        decoder: convolutions of each level, top first.
        output: convolution that gives the logits.
        deep_outputs: the same for lower levels, in training mode.
    """

    if TYPE_CHECKING:  # TorchScript would evaluate the annotations
        padding: bool
        up: nn.ModuleList
        decoder: nn.ModuleList
        output: Any
        deep_outputs: nn.ModuleList

    def decode(
        self, x: torch.Tensor, skips: list[torch.Tensor]
    ) -> torch.Tensor | list[torch.Tensor]:
        """Return the logits; in training mode with deep supervision, those of each level.

        Args:
            x: output of the lowest level.
            skips: outputs of the encoder's levels above it, top first.
        """
        levels: list[torch.Tensor] = []  # the decoder's outputs, the lowest level first
        for level in range(len(skips) - 1, -1, -1):
            x = self._decode_level(level, x, skips[level])
            levels.append(x)
        logits: torch.Tensor = self.output(x)
        if not self.training or len(self.deep_outputs) == 0:
            return logits
        levels.reverse()
        outputs = [logits]
        for level, head in enumerate(self.deep_outputs, start=1):
            outputs.append(head(levels[level]))
        return outputs

    def _decode_level(self, level: int, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        """Return the output of one level, of the one below it and of the skip connection."""
        # TorchScript can neither index a ModuleList by a variable nor iterate over it backwards
        for number, (up, block) in enumerate(zip(self.up, self.decoder, strict=True)):
            if number == level:
                x = up(x)
                if not self.padding:
                    skip = centre_crop(skip, x)
                x = block(torch.cat([x, skip], dim=1))
        return x


class UNet(UNetDecoder):
    """A U-Net: encoder, bottleneck and decoder with skip connections, in 2D or 3D.

    Each encoder level is a double convolution followed by a max pooling. Each decoder level
    upsamples by a transposed convolution whose kernel is its stride, concatenates the result with
    the skip connection (the upsampled channels first) and applies a double convolution. A 1×1(×1)
    convolution gives the logits.

    `torch.jit.script` and `torch.jit.trace` compile the network, without the check of the input's
    shape. A scripted network still returns deep supervision in training mode; a traced one always
    returns what it returned when it was traced.

    Args:
        spatial_dims: 2 (Conv2d) or 3 (Conv3d).
        in_channels: channels of the image.
        out_channels: channels of the logits: classes with the background for a softmax, structures
            without it for a sigmoid.
        features: channels per level, from the top; the last number is the bottleneck's.
        strides: stride of each pooling from the top, one fewer than features: a number, or one
            number per spatial axis such as (2, 2, 1). None means 2 everywhere.
        norm: None, `batch`, or `instance` (`InstanceNorm`).
        activation: a name of MONAI's `Act`.
        residual: whether each block adds its input to its output.
        dropout: probability of dropping a whole channel after each block.
        contraction_dropout: probability of dropping single values at the end of the encoder: after
            its last block and after the bottleneck.
        deep_supervision: number of lower decoder levels that return logits during training.
        padding: whether convolutions are padded. Without padding, skip connections are cropped to
            their centre and the output is smaller than the input by a fixed margin
            (`pipeline.config.margin`), so that no output voxel depends on padded values.
        kernels: kernel size of the convolutions of each level from the top, as many as features: a
            number, or one number per spatial axis such as (3, 3, 1). None means 3 everywhere;
            anything else needs padding.

    Shapes:
        (B, in_channels, *spatial) → logits (B, out_channels, *spatial), where each spatial size is
        a multiple of the product of the strides along its axis. Without padding the output is
        smaller (572 → 388), and the sizes must fit every pooling (`pipeline.config.output_size`).
        In training mode with deep supervision: a list of logits, first at full size, then those of
        the lower decoder levels at their own sizes.

    Raises:
        ShapeError: the arguments do not fit together, or an input of `forward` has an invalid size;
            the message names the nearest valid sizes.
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
        kernels: Sequence[int | Sequence[int]] | None = None,
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
                f"features {tuple(features)}, strides {self.strides}, deep_supervision "
                f"{deep_supervision}: expected at least two features, one stride fewer than "
                "features, and fewer deep outputs than strides"
            )

        kernel_of = kernels or [3] * len(features)
        if len(kernel_of) != len(features) or (kernels is not None and not padding):
            raise ShapeError(
                f"kernels {kernels}: expected one per level ({len(features)}), in a network with "
                "padding"
            )

        def block(channels: int, out: int, kernel: int | Sequence[int]) -> ConvBlock:
            return ConvBlock(
                spatial_dims,
                channels,
                out,
                norm=norm,
                activation=activation,
                residual=residual,
                dropout=dropout,
                padding=padding,
                kernel=kernel,
            )

        conv = Conv[Conv.CONV, spatial_dims]
        max_pool = Pool[Pool.MAX, spatial_dims]
        conv_transposed = Conv[Conv.CONVTRANS, spatial_dims]
        above, below = features[:-1], features[1:]  # channels of each level, and of the one below
        # Do not rename or reorder these attributes: their names are the keys in published state
        # dicts, and their order decides which initial weights follow from a seed
        self.encoder = nn.ModuleList(map(block, (in_channels, *above[:-1]), above, kernel_of))
        self.pool = nn.ModuleList(max_pool(stride, stride) for stride in self.strides)
        self.bottleneck = block(above[-1], below[-1], kernel_of[-1])
        self.contraction_dropout = (
            nn.Dropout(contraction_dropout) if contraction_dropout else nn.Identity()
        )
        self.up = nn.ModuleList(map(conv_transposed, below, above, self.strides, self.strides))
        # twice the channels: the upsampled ones and those of the skip connection
        self.decoder = nn.ModuleList(map(block, [2 * width for width in above], above, kernel_of))
        self.output = conv(features[0], out_channels, kernel_size=1)
        self.deep_outputs = nn.ModuleList(
            conv(width, out_channels, kernel_size=1) for width in below[:deep_supervision]
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        if not is_scripting():
            check_input(x, self.in_channels, self.strides, padding=self.padding)
        skips: list[torch.Tensor] = []
        for level, (block, pool) in enumerate(zip(self.encoder, self.pool, strict=True), start=1):
            x = block(x)
            if level == len(self.encoder):
                x = self.contraction_dropout(x)
            skips.append(x)
            x = pool(x)
        x = self.contraction_dropout(self.bottleneck(x))
        return self.decode(x, skips)


def check_input(
    x: torch.Tensor, in_channels: int, strides: Sequence[Sequence[int]], *, padding: bool = True
) -> None:
    """Raise ShapeError unless a tensor has a shape that a U-Net accepts.

    Args:
        x: (B, C, *spatial) input.
        in_channels: channels that the network accepts.
        strides: of each pooling, one number per spatial axis.
        padding: whether the convolutions are padded.
    """
    # tracing would record the sizes as constants, and warn about it
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return
    strides_by_axis = list(zip(*strides, strict=True))
    shape = [int(n) for n in x.shape]
    if len(shape) != len(strides_by_axis) + 2 or shape[1] != in_channels:
        sizes = ", ".join(f"{prod(along)}·n" for along in strides_by_axis)
        raise ShapeError(f"input has shape {tuple(shape)}, expected (B, {in_channels}, {sizes})")
    for axis, (size, along) in enumerate(zip(shape[2:], strides_by_axis, strict=True)):
        if output_size(size, along, padding=padding) is None:
            _refuse_size(axis, size, along, padding=padding)


def _refuse_size(axis: int, size: int, strides: Sequence[int], *, padding: bool) -> None:
    expected = "a size that fits every pooling"
    if padding:
        expected = f"a multiple of {prod(strides)} (the product of the strides there)"
    nearest = nearest_valid_sizes(size, strides, padding=padding)
    raise ShapeError(
        f"input has {size} voxels along spatial axis {axis}, expected {expected}: pad or crop "
        f"it to {nearest}, or use pipeline.inference.build_inferer, which pads"
    )


def centre_crop(x: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Return the centre of x, cropped to the spatial size of another tensor.

    Args:
        x: (B, C, *spatial), at least as large as `reference` along each spatial axis.
        reference: (B, any number of channels, *cropped); only its size matters.

    Returns:
        (B, C, *cropped), a view of x.
    """
    # Sizes are read before the loop and axes of equal size are narrowed too: otherwise the second
    # call of a scripted network fails in torch's optimiser ("Expected Tensor but got None")
    sizes = reference.shape
    for axis in range(2, len(sizes)):
        x = x.narrow(axis, (x.shape[axis] - sizes[axis]) // 2, sizes[axis])
    return x


def norm_layers(norm: str | None, spatial_dims: int, channels: int) -> list[nn.Module]:
    """Return the layer of a norm in a list, or an empty list for None."""
    if norm is None:
        return []
    if norm == "batch":
        return [Norm[Norm.BATCH, spatial_dims](channels)]
    if norm == "instance":
        return [InstanceNorm(channels)]
    raise ShapeError(f"norm: expected None, 'batch' or 'instance', got {norm!r}")


def activation_layer(name: str) -> nn.Module:
    """Return the layer of an activation, a name of MONAI's `Act`."""
    kind = Act[name]
    # in place where torch can do that: the largest tensors of the network are not copied
    layer: nn.Module = kind(inplace=True) if kind in (nn.ReLU, nn.LeakyReLU, nn.SiLU) else kind()
    return layer
