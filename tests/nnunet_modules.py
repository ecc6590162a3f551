"""Modules with the names of nnU-Net's networks, and model folders as nnU-Net writes them.

They are written by hand from the names in nnU-Net's checkpoints, so that tests need no nnU-Net.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

CONV = {2: nn.Conv2d, 3: nn.Conv3d}
CONV_TRANSPOSED = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORM = {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
POOL = {2: nn.AvgPool2d, 3: nn.AvgPool3d}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a network; those of the decoder are counted from the bottom, as in nnU-Net."""

    features: tuple[int, ...] = (4, 6, 8)
    strides: tuple[tuple[int, ...], ...]
    kernels: tuple[tuple[int, ...], ...]
    blocks: tuple[int, ...] = (1, 3, 2)
    decoder: tuple[int, ...] = (2, 1)


SHAPES = {
    2: Shape(strides=((1, 1), (2, 2), (1, 2)), kernels=((3, 3), (3, 3), (1, 3))),
    3: Shape(strides=((1, 1, 1), (2, 2, 1), (2, 2, 2)), kernels=((3, 3, 1), (3, 3, 3), (3, 3, 3))),
}


class ConvNormAct(nn.Module):
    """One convolution with its norm; `all_modules` holds the same layers a second time."""

    def __init__(
        self,
        dims: int,
        inputs: int,
        outputs: int,
        kernel: Any,
        stride: Any,
        *,
        act: bool,
        bias: bool,
    ) -> None:
        super().__init__()
        padding: Any = [size // 2 for size in kernel]
        self.conv = CONV[dims](inputs, outputs, kernel, stride, padding, bias=bias)
        self.norm = NORM[dims](outputs, eps=1e-5, affine=True)
        self.all_modules = nn.Sequential(self.conv, self.norm)
        if act:
            self.all_modules.append(nn.LeakyReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.all_modules(x)  # type: ignore[no-any-return]


class Convs(nn.Module):
    """Several convolutions, the first one with a stride."""

    def __init__(
        self, dims: int, inputs: int, outputs: int, kernel: Any, stride: Any, count: int
    ) -> None:
        super().__init__()
        self.convs = nn.Sequential()
        for number in range(count):
            first = number == 0
            self.convs.append(
                ConvNormAct(
                    dims,
                    inputs if first else outputs,
                    outputs,
                    kernel,
                    stride if first else 1,
                    act=True,
                    bias=True,
                )
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.convs(x)  # type: ignore[no-any-return]


class Block(nn.Module):
    """A residual block."""

    def __init__(self, dims: int, inputs: int, outputs: int, kernel: Any, stride: Any) -> None:
        super().__init__()
        self.conv1 = ConvNormAct(dims, inputs, outputs, kernel, stride, act=True, bias=True)
        self.conv2 = ConvNormAct(dims, outputs, outputs, kernel, 1, act=False, bias=True)
        self.skip = nn.Sequential()
        if any(number > 1 for number in stride):
            self.skip.append(POOL[dims](stride, stride))
        if inputs != outputs:
            unit = (1,) * dims
            self.skip.append(ConvNormAct(dims, inputs, outputs, unit, 1, act=False, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.leaky_relu(self.conv2(self.conv1(x)) + self.skip(x))


class Blocks(nn.Module):
    """Several residual blocks."""

    def __init__(
        self, dims: int, inputs: int, outputs: int, kernel: Any, stride: Any, count: int
    ) -> None:
        super().__init__()
        first = Block(dims, inputs, outputs, kernel, stride)
        others = [Block(dims, outputs, outputs, kernel, (1,) * dims) for _ in range(count - 1)]
        self.blocks = nn.Sequential(first, *others)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks(x)  # type: ignore[no-any-return]


class Encoder(nn.Module):
    """The contracting path; returns the output of every level."""

    def __init__(self, dims: int, shape: Shape, *, residual: bool) -> None:
        super().__init__()
        inputs, unit = 2, (1,) * dims
        self.stem = None
        if residual:
            self.stem = Convs(dims, inputs, shape.features[0], shape.kernels[0], unit, 1)
            inputs = shape.features[0]
        self.stages = nn.Sequential()
        levels = zip(shape.features, shape.kernels, shape.strides, shape.blocks, strict=True)
        for outputs, kernel, stride, count in levels:
            kind = Blocks if residual else Convs
            stage = kind(dims, inputs, outputs, kernel, stride, count)
            self.stages.append(stage if residual else nn.Sequential(stage))
            inputs = outputs

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        outputs = []
        x = x if self.stem is None else self.stem(x)
        for stage in self.stages:
            x = stage(x)
            outputs.append(x)
        return outputs


class Decoder(nn.Module):
    """The expanding path; it holds the encoder a second time."""

    def __init__(self, dims: int, encoder: Encoder, shape: Shape, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.stages, self.transpconvs = nn.ModuleList(), nn.ModuleList()
        self.seg_layers = nn.ModuleList()
        for number, count in enumerate(shape.decoder, start=1):
            below, above = shape.features[-number], shape.features[-number - 1]
            stride: Any = shape.strides[-number]
            kernel = shape.kernels[-number - 1]
            self.transpconvs.append(CONV_TRANSPOSED[dims](below, above, stride, stride))
            self.stages.append(Convs(dims, 2 * above, above, kernel, 1, count))
            self.seg_layers.append(CONV[dims](above, classes, 1))

    def forward(self, levels: list[torch.Tensor]) -> torch.Tensor:
        x = levels[-1]
        for number, (up, stage) in enumerate(zip(self.transpconvs, self.stages, strict=True)):
            x = stage(torch.cat([up(x), levels[-number - 2]], dim=1))
        return self.seg_layers[-1](x)  # type: ignore[no-any-return]


class Network(nn.Module):
    """A whole network."""

    def __init__(self, dims: int, *, residual: bool, classes: int) -> None:
        super().__init__()
        self.encoder = Encoder(dims, SHAPES[dims], residual=residual)
        self.decoder = Decoder(dims, self.encoder, SHAPES[dims], classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.encoder(x))  # type: ignore[no-any-return]


def nnunet_network(dims: int, *, residual: bool, classes: int = 3, seed: int = 0) -> Network:
    """Return a network with the names of nnU-Net's and weights that differ everywhere."""
    torch.manual_seed(seed)
    network = Network(dims, residual=residual, classes=classes)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.4)
    return network


def nnunet_plans(dims: int, *, residual: bool) -> dict[str, Any]:
    """Return the content of plans.json for such a network."""
    shape = SHAPES[dims]
    blocks = "n_blocks_per_stage" if residual else "n_conv_per_stage"
    resampling = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
    configuration = {
        "preprocessor_name": "DefaultPreprocessor",
        "patch_size": [16, 24, 12][:dims],
        "spacing": [1.5, 1.1, 0.9][-dims:],
        "normalization_schemes": ["ZScoreNormalization", "CTNormalization"],
        "use_mask_for_norm": [True, False],
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": resampling,
        "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
        "resampling_fn_probabilities_kwargs": resampling | {"order": 1},
        "architecture": {
            "network_class_name": "dynamic_network_architectures.architectures.unet."
            + ("ResidualEncoderUNet" if residual else "PlainConvUNet"),
            "arch_kwargs": {
                "n_stages": 3,
                "features_per_stage": list(shape.features),
                "kernel_sizes": [list(kernel) for kernel in shape.kernels],
                "strides": [list(stride) for stride in shape.strides],
                blocks: list(shape.blocks),
                "n_conv_per_stage_decoder": list(shape.decoder),
                "conv_bias": True,
                "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dims}d",
                "norm_op_kwargs": {"eps": 1e-5, "affine": True},
                "nonlin": "torch.nn.LeakyReLU",
                "nonlin_kwargs": {"inplace": True},
            },
        },
    }
    name = "2d" if dims == 2 else "3d_fullres"
    statistics = {"mean": 90.0, "std": 40.0, "percentile_00_5": 10.0, "percentile_99_5": 180.0}
    return {
        "dataset_name": "Dataset042_Phantom",
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [1, 0, 2],
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {"0": statistics, "1": statistics},
        "configurations": {name: configuration, "bigger": {"inherits_from": name}},
    }


def write_nnunet_model(
    folder: Path,
    dims: int,
    *,
    residual: bool = False,
    folds: int = 1,
    plans: dict[str, Any] | None = None,
    dataset: dict[str, Any] | None = None,
    classes: int = 3,
) -> Path:
    """Write a model folder as nnU-Net does and return it."""
    folder.mkdir(parents=True)
    content = plans or nnunet_plans(dims, residual=residual)
    (folder / "plans.json").write_text(json.dumps(content))
    described = {
        "channel_names": {"0": "T1w", "1": "CT"},
        "labels": {"background": 0, "back": 2, "front": 1},
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(dataset or described))
    for fold in range(folds):
        path = folder / f"fold_{fold}" / "checkpoint_final.pth"
        path.parent.mkdir()
        network = nnunet_network(dims, residual=residual, classes=classes, seed=fold)
        checkpoint = {
            "network_weights": network.state_dict(),
            "init_args": {"configuration": "2d" if dims == 2 else "3d_fullres", "plans": content},
            "trainer_name": "nnUNetTrainer",
            "inference_allowed_mirroring_axes": tuple(range(dims)),
            "_best_ema": np.float64(0.5),
            "logging": {"mean_fg_dice": [np.float32(0.4)]},
        }
        torch.save(checkpoint, path)
    return folder
