"""nnU-Net's U-Nets, in 2D or 3D: the first convolution of each level downsamples by its stride.

`plain_conv_unet` has plain convolutions in its encoder, `residual_encoder_unet` residual blocks.
The decoder is the same. Weights of nnU-Net's own classes PlainConvUNet and ResidualEncoderUNet fit
after `from_nnunet` (`pipeline.networks.nnunet_weights`) has renamed them.

References:
    Isensee et al.: nnU-Net. Nature Methods 18 (2021), doi:10.1038/s41592-020-01008-z.
    Isensee et al.: nnU-Net Revisited. MICCAI 2024, doi:10.1007/978-3-031-72114-4_47.
    He et al.: Bag of Tricks for Image Classification with Convolutional Neural Networks. CVPR 2019,
    doi:10.1109/CVPR.2019.00065: the average pooling before the projection of a residual block.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from monai.networks.layers import Conv, Pool
from torch import nn

from pipeline.networks.unet import (
    UNetDecoder,
    activation_layer,
    check_input,
    is_scripting,
    norm_layers,
)

Sizes = int | Sequence[int]
"""A size along all spatial axes, or one per axis."""


class ConvNorm(nn.Module):
    """A padded convolution and, if there is one, a norm.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel: kernel size, odd numbers.
        stride: stride of the convolution.
        norm: None, `batch` or `instance`.
        bias: whether the convolution has a bias.

    Shapes:
        (B, in_channels, *spatial) → (B, out_channels, *spatial / stride).
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        kernel: Sequence[int],
        stride: Sizes = 1,
        norm: str | None,
        bias: bool,
    ) -> None:
        super().__init__()
        self.conv = Conv[Conv.CONV, spatial_dims](
            in_channels,
            out_channels,
            tuple(kernel),
            stride,
            padding=tuple(size // 2 for size in kernel),
            bias=bias,
        )
        layers = norm_layers(norm, spatial_dims, out_channels)
        self.norm = layers[0] if layers else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normalised: torch.Tensor = self.norm(self.conv(x))
        return normalised


class ActivatedConv(ConvNorm):
    """`ConvNorm` followed by an activation.

    Args:
        activation: a name of MONAI's `Act`.
        settings: the arguments of `ConvNorm`.
    """

    def __init__(self, *args: int, activation: str, **settings: object) -> None:
        super().__init__(*args, **settings)  # type: ignore[arg-type]
        self.activation = activation_layer(activation)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        activated: torch.Tensor = self.activation(self.norm(self.conv(x)))
        return activated


class ResidualBlock(nn.Module):
    """Two convolutions whose output is added to the input, before the last activation.

    If the sizes differ, the input is averaged over each stride; if the channels differ, it goes
    through a convolution of kernel size 1.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel: kernel size of both convolutions.
        stride: stride of the first convolution, one number per spatial axis.
        norm: None, `batch` or `instance`.
        bias: whether the convolutions have a bias; that of the input's convolution never has.
        activation: a name of MONAI's `Act`.

    Shapes:
        (B, in_channels, *spatial) → (B, out_channels, *spatial / stride).
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        kernel: Sequence[int],
        stride: Sequence[int],
        norm: str | None,
        bias: bool,
        activation: str,
    ) -> None:
        super().__init__()
        self.first = ActivatedConv(
            spatial_dims,
            in_channels,
            out_channels,
            kernel=kernel,
            stride=tuple(stride),
            norm=norm,
            bias=bias,
            activation=activation,
        )
        self.second = ConvNorm(
            spatial_dims, out_channels, out_channels, kernel=kernel, norm=norm, bias=bias
        )
        average = Pool[Pool.AVG, spatial_dims]
        strided = any(number != 1 for number in stride)
        self.pool = average(tuple(stride), tuple(stride)) if strided else nn.Identity()
        self.projection: nn.Module = nn.Identity()
        if in_channels != out_channels:
            self.projection = ConvNorm(
                spatial_dims,
                in_channels,
                out_channels,
                kernel=(1,) * spatial_dims,
                norm=norm,
                bias=False,
            )
        self.activation = activation_layer(activation)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skipped = self.projection(self.pool(x))
        activated: torch.Tensor = self.activation(self.second(self.first(x)) + skipped)
        return activated


class StridedUNet(UNetDecoder):
    """A U-Net whose encoder downsamples by strided convolutions, as nnU-Net's do.

    Args:
        spatial_dims: 2 for slices, 3 for volumes.
        in_channels: channels of the image.
        out_channels: channels of the logits.
        features: channels of each level, top first.
        strides: between one level and the next, top first; one number per spatial axis.
        kernels: kernel size of the convolutions of each level, top first, odd numbers.
        encoder_blocks: number of convolutions, or of residual blocks, of each level, top first.
        decoder_convolutions: number of convolutions of each level of the decoder, top first.
        residual: whether the encoder has residual blocks, after one convolution at the top.
        norm: None, `batch` or `instance`.
        activation: a name of MONAI's `Act`.
        conv_bias: whether the convolutions have a bias.
        deep_supervision: number of lower levels with an output of their own during training.

    Shapes:
        (B, in_channels, *spatial) → (B, out_channels, *spatial). In training mode with
        `deep_supervision`: a list, the whole size first, then that of each lower level. Every
        spatial size is a multiple of the product of the strides there.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        features: Sequence[int],
        strides: Sequence[Sequence[int]],
        kernels: Sequence[Sequence[int]],
        encoder_blocks: Sequence[int],
        decoder_convolutions: Sequence[int],
        *,
        residual: bool,
        norm: str | None,
        activation: str,
        conv_bias: bool,
        deep_supervision: int = 0,
    ) -> None:
        super().__init__()
        self.in_channels, self.padding = in_channels, True
        self.strides = tuple(tuple(stride) for stride in strides)

        def convolutions(
            in_channels: int, level: int, count: int, stride: Sequence[int]
        ) -> nn.Sequential:
            layers = nn.Sequential()
            for number in range(count):
                layers.append(
                    ActivatedConv(
                        spatial_dims,
                        features[level] if number else in_channels,
                        features[level],
                        kernel=kernels[level],
                        stride=1 if number else tuple(stride),
                        norm=norm,
                        bias=conv_bias,
                        activation=activation,
                    )
                )
            return layers

        def residual_blocks(
            in_channels: int, level: int, count: int, stride: Sequence[int]
        ) -> nn.Sequential:
            layers = nn.Sequential()
            for number in range(count):
                layers.append(
                    ResidualBlock(
                        spatial_dims,
                        features[level] if number else in_channels,
                        features[level],
                        kernel=kernels[level],
                        stride=unit if number else stride,
                        norm=norm,
                        bias=conv_bias,
                        activation=activation,
                    )
                )
            return layers

        unit = (1,) * spatial_dims
        self.stem: nn.Module = nn.Identity()
        if residual:
            self.stem = convolutions(in_channels, 0, 1, unit)
        make = residual_blocks if residual else convolutions
        inputs = (features[0] if residual else in_channels, *features[:-1])
        downsampling = (unit, *self.strides)
        self.encoder = nn.ModuleList(
            make(inputs[level], level, encoder_blocks[level], downsampling[level])
            for level in range(len(features))
        )
        above, below = features[:-1], features[1:]
        conv_transposed = Conv[Conv.CONVTRANS, spatial_dims]
        self.up = nn.ModuleList(
            conv_transposed(low, high, stride, stride, bias=conv_bias)
            for low, high, stride in zip(below, above, self.strides, strict=True)
        )
        # twice the channels: the upsampled ones and those of the skip connection
        self.decoder = nn.ModuleList(
            convolutions(2 * above[level], level, decoder_convolutions[level], unit)
            for level in range(len(above))
        )
        conv = Conv[Conv.CONV, spatial_dims]
        self.output = conv(features[0], out_channels, kernel_size=1)
        self.deep_outputs = nn.ModuleList(
            conv(width, out_channels, kernel_size=1) for width in below[:deep_supervision]
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        if not is_scripting():
            check_input(x, self.in_channels, self.strides)
        x = self.stem(x)
        skips: list[torch.Tensor] = []
        for level, block in enumerate(self.encoder, start=1):
            x = block(x)
            if level < len(self.encoder):
                skips.append(x)
        return self.decode(x, skips)
