"""volseg's own inferer in place of a foreign bundle's: the same labels in less time and memory.

The first steps of the bundle's postprocessing are replaced where they are of the usual kind:

- `Activationsd` (softmax) → `Invertd` → `AsDiscreted` (argmax): each block of logits is inverted
  before the next one is computed;
- `Activationsd` (softmax) → `AsDiscreted` (argmax): each block becomes labels on the network's
  grid;
- anything else: nothing is replaced, and the logits are held whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from monai.data import MetaTensor
from monai.data.utils import collate_meta_tensor
from monai.engines import SupervisedEvaluator
from monai.inferers import Inferer, SlidingWindowInferer
from monai.transforms import Activationsd, AsDiscreted, Invertd
from numpy.typing import NDArray
from torch import nn

from pipeline.bundle.foreign.agreement import Choice
from pipeline.errors import ConfigError
from pipeline.inference import (
    FLOAT32_BYTES,
    OpenVinoNetwork,
    ScoreBlock,
    WindowInferer,
    buffer_bytes,
    compute_apart,
    convert_by_tracing,
    import_openvino,
    labels_of_blocks,
)
from pipeline.io import Grid
from pipeline.types import Affine, Array, NetworkFunction

if TYPE_CHECKING:
    import openvino as ov

Form = Literal["inverted", "labels", "logits"]
WORDS = {
    "inverted": "with streamed inversion",
    "labels": "with labels by blocks",
    "logits": "with whole logits",
}
SIGMA = 0.125  # of MONAI's Gaussian, the only one that volseg's inferer has
CROPS = ("CropForeground", "SpatialCrop", "CenterSpatialCrop", "RandSpatialCrop", "Crop")
EDGE = 1e-3  # voxels
# of the windows' sums that are held at a time: with 100 classes, more is a gigabyte each
BUFFER_BYTES = 2**28
# of a window's logits, besides the sums: the output, and OpenVINO's own while it computes
WINDOW_COPIES = 2


@dataclass(frozen=True, kw_only=True)
class Replacement:
    """How volseg computes a foreign bundle's cases.

    Attributes:
        form: what comes out of the inferer.
        replaced: number of the first steps of the postprocessing that are left out.
        own: the bundle's own inferer.
        network: what computes a window.
        conversion: of the bundle's network to OpenVINO.
    """

    form: Form
    replaced: int
    own: SlidingWindowInferer
    network: nn.Module
    conversion: Conversion

    @property
    def roi_size(self) -> tuple[int, ...]:
        """Size of a window, voxels."""
        return self.conversion.roi_size

    @property
    def precision(self) -> str:
        """Precision of the arithmetic; before the first window, the one that was asked for."""
        return self.network.precision if isinstance(self.network, ConvertedOnce) else "float32"

    @property
    def longest_side(self) -> int:
        """The longest side of a window, voxels."""
        return max(self.roi_size)

    @property
    def streams(self) -> bool:
        """Whether the logits are never held whole."""
        return self.form != "logits"

    @property
    def words(self) -> str:
        """What is replaced, in words."""
        return WORDS[self.form]

    def held_bytes(self, channels: int, shape: Sequence[int]) -> int:
        """Return the largest size of the logits that are held at a time, bytes.

        Args:
            channels: of the network's output.
            shape: of the image on the network's grid, voxels.
        """
        windows = self.windows().windows(shape, channels, BUFFER_BYTES)
        window = FLOAT32_BYTES * channels * prod(self.roi_size)
        return buffer_bytes(windows, channels) + WINDOW_COPIES * window

    def windows(self) -> WindowInferer:
        """Return volseg's inferer with the settings of the bundle's own."""
        return WindowInferer(
            self.roi_size,
            float(self.own.overlap),
            placement="monai",
            mode=str(self.own.mode),
            padding_mode=str(self.own.padding_mode),
        )

    def with_runtime(
        self, choice: Choice, device: torch.device, trial: Path | None = None
    ) -> Replacement:
        """Return the same replacement with a runtime for the network.

        Args:
            choice: `torch` or `openvino`, and its precision.
            device: that computes.
            trial: folder, if OpenVINO is to compute the first window in a process of its own first,
                because it might crash.

        Raises:
            ConfigError: OpenVINO is for the CPU.
        """
        if choice.runtime == "torch":
            return self
        if device.type != "cpu":
            raise ConfigError(f"OpenVINO runs on the CPU here, the device is {device}")
        return replace(self, network=ConvertedOnce(self.conversion, choice.precision, trial))

    def inferer(
        self, grid: Grid, *, uncertainty: bool = False, probabilities: bool = False
    ) -> BlockInferer:
        """Return an inferer for one case, on the grid of its first file."""
        return BlockInferer(self, grid, uncertainty=uncertainty, probabilities=probabilities)


def plan_replacement(evaluator: Any, transforms: Sequence[Any]) -> Replacement | str:
    """Return how volseg can compute a bundle's cases, or why it cannot.

    Args:
        evaluator: of the bundle.
        transforms: of its postprocessing.
    """
    inferer, network = evaluator.inferer, evaluator.network
    if type(evaluator) is not SupervisedEvaluator:
        return f"its evaluator is {type(evaluator).__name__}, not MONAI's SupervisedEvaluator"
    if type(inferer) is not SlidingWindowInferer:
        return f"its inferer is {type(inferer).__name__}, not MONAI's SlidingWindowInferer"
    problem = _inferer_problem(inferer)
    if problem:
        return problem
    if any(p.dtype != torch.float32 for p in network.parameters()):
        return "its network is not in float32"
    form, replaced = _form(transforms)
    roi = inferer.roi_size
    conversion = Conversion(network, (roi,) * 3 if isinstance(roi, int) else tuple(roi))
    return Replacement(
        form=form, replaced=replaced, own=inferer, network=network, conversion=conversion
    )


def _inferer_problem(inferer: SlidingWindowInferer) -> str:
    roi = inferer.roi_size
    sides = [roi] if isinstance(roi, int) else list(roi)
    if len(sides) not in (1, 3) or min(sides) < 1:
        return f"its windows have the size {roi}, expected three numbers above 0"
    if not isinstance(inferer.overlap, float | int):
        return "the overlap of its windows differs between axes"
    if inferer.with_coord or inferer.sigma_scale != SIGMA:
        return "its inferer has settings that volseg's has not"
    zeros = inferer.padding_mode == "constant" and inferer.cval == 0
    if not zeros and inferer.padding_mode != "replicate":
        return f"it pads small images by {inferer.padding_mode}"
    return ""


def _form(transforms: Sequence[Any]) -> tuple[Form, int]:
    """Return what of a postprocessing can be done block by block, and how many steps that is."""
    steps = list(transforms)
    softened = bool(steps) and _softmax(steps[0])
    if softened and len(steps) > 2 and _linear_invert(steps[1]) and _argmax(steps[2]):
        return "inverted", 3
    # `_Keep` needs the probabilities, so it stays out of what is replaced
    first = 1 if softened else 0
    if len(steps) > first and _argmax(steps[first]):
        return "labels", first + 1
    return "logits", 0


def _softmax(step: Any) -> bool:
    return (
        isinstance(step, Activationsd)
        and _all(step.softmax, True)
        and _all(step.sigmoid, False)
        and _all(step.other, None)
    )


def _argmax(step: Any) -> bool:
    return (
        isinstance(step, AsDiscreted)
        and _all(step.argmax, True)
        and _all(step.to_onehot, None)
        and _all(step.threshold, None)
        and _all(step.rounding, None)
    )


def _linear_invert(step: Any) -> bool:
    return isinstance(step, Invertd) and _all(step.nearest_interp, False)


def _all(values: Sequence[Any], wanted: Any) -> bool:
    return all(value == wanted for value in values)


class Conversion:
    """A bundle's network as a model of OpenVINO, converted when it is first asked for.

    Args:
        network: in torch.
        roi_size: of its windows, voxels.
    """

    def __init__(self, network: nn.Module, roi_size: tuple[int, ...]) -> None:
        self.network, self.roi_size = network, roi_size
        self._model: ov.Model | None = None

    def model(self, channels: int) -> ov.Model:
        """Return a model with the output (B, *roi_size, classes).

        OpenVINO computes in this order, and would hold a second copy in the order of torch.

        Args:
            channels: of the input.
        """
        if self._model is None:
            self._model = self._convert(channels)
        return self._model

    def _convert(self, channels: int) -> ov.Model:
        openvino = import_openvino()
        from openvino.preprocess import PrePostProcessor

        noise = torch.randn(1, channels, *self.roi_size, generator=torch.manual_seed(0))
        model = convert_by_tracing(self.network, noise, [-1, channels, *self.roi_size])
        ordered = PrePostProcessor(model)
        ordered.output(0).model().set_layout(openvino.Layout("NCDHW"))
        ordered.output(0).tensor().set_layout(openvino.Layout("NDHWC"))
        built: ov.Model = ordered.build()
        return built


class ConvertedOnce(nn.Module):
    """A network in OpenVINO, converted for the first window that comes.

    Args:
        conversion: of the network.
        precision: that OpenVINO is asked for, `float32` or `bfloat16`.
        trial: folder, if a process of its own computes the first window first.

    Attributes:
        precision: that OpenVINO really computes in; before the first window, the one asked for.

    Shapes:
        (B, C, *roi_size) → logits (B, classes, *roi_size) float32.
    """

    def __init__(
        self, conversion: Conversion, precision: str = "float32", trial: Path | None = None
    ) -> None:
        super().__init__()
        self.conversion, self.precision, self.trial = conversion, precision, trial
        self._converted: OpenVinoNetwork | None = None

    def forward(self, window: torch.Tensor) -> Any:
        if self._converted is None:
            model = self.conversion.model(window.shape[1])
            if self.trial is not None:
                compute_apart(model, window, self.precision, self.trial)
            self._converted = OpenVinoNetwork(model, self.precision)
            self.precision = self._converted.precision(window)
        return self._converted(window).movedim(-1, 1)


class BlockInferer(Inferer):
    """Computes one case by volseg's windows, and reduces each block of logits at once.

    Args:
        replacement: how.
        grid: of the case's first file.
        uncertainty: whether the entropy of the class probabilities is kept.
        probabilities: whether the probability of each output is kept.

    Attributes:
        kept: entropy and probabilities, where the replacement inverts; None elsewhere.
    """

    def __init__(
        self, replacement: Replacement, grid: Grid, *, uncertainty: bool, probabilities: bool
    ) -> None:
        super().__init__()
        self.replacement, self.grid = replacement, grid
        self.uncertainty, self.probabilities = uncertainty, probabilities
        self.kept: tuple[Array | None, NDArray[np.uint8] | None] | None = None

    def __call__(
        self, inputs: torch.Tensor, network: NetworkFunction, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Return what the replacement's form says, for a batch of one image (1, C, X, Y, Z)."""
        windows = self.replacement.windows()
        if self.replacement.form == "logits":
            whole: torch.Tensor = windows(inputs, self.replacement.network)
            return whole
        blocks = windows.blocks(inputs[0], self.replacement.network, buffer_bytes=BUFFER_BYTES)
        if self.replacement.form == "labels":
            found = labels_on_network_grid(blocks)
        else:
            found = self._inverted(blocks, inputs[0])
            affine = torch.as_tensor(self.grid.affine)
            return _as_batch(MetaTensor(found[None].float(), affine=affine))
        if not isinstance(inputs, MetaTensor):
            return found[None, None].float()
        # with the operations of the image, so that later steps can invert them
        like = MetaTensor(found[None].float(), meta=inputs[0].meta.copy())
        like.applied_operations = inputs[0].applied_operations
        return _as_batch(like)

    def _inverted(self, blocks: Iterator[ScoreBlock], image: torch.Tensor) -> torch.Tensor:
        """Return the label map on the file's grid, (X, Y, Z)."""
        if not isinstance(image, MetaTensor):
            raise ConfigError("its preprocessing drops the affine of the image")
        affine = np.asarray(image.affine.cpu(), dtype=np.float64)
        shape, channels = tuple(self.grid.shape), 0
        uncertainty = torch.zeros(shape) if self.uncertainty else None
        probabilities = None
        if self.probabilities:
            first = next(blocks)
            channels = len(first.scores)
            blocks = chain([first], blocks)
            probabilities = torch.zeros((channels, *shape), dtype=torch.uint8)
        labels = labels_of_blocks(
            blocks,
            affine,
            self.grid.affine,
            shape,
            uncertainty=uncertainty,
            probabilities=probabilities,
        )
        if any(step["class"] in CROPS for step in image.applied_operations):
            labels[outside(affine, tuple(image.shape[1:]), self.grid)] = 0
        if uncertainty is not None or probabilities is not None:
            self.kept = (
                None if uncertainty is None else uncertainty.numpy(),
                None if probabilities is None else probabilities.numpy(),
            )
        return labels


def _as_batch(image: MetaTensor) -> torch.Tensor:
    batch: torch.Tensor = collate_meta_tensor([image])
    return batch


def labels_on_network_grid(blocks: Iterator[ScoreBlock]) -> torch.Tensor:
    """Return the number of the highest class in each voxel, (X, Y, Z)."""
    labels = None
    for block in blocks:
        if labels is None:
            labels = torch.zeros(block.shape, dtype=torch.int32, device=block.scores.device)
        sizes = block.scores.shape[1:]
        box = tuple(slice(s, s + n) for s, n in zip(block.start, sizes, strict=True))
        labels[box] = block.scores.argmax(dim=0).to(torch.int32)
        del block  # or it would be held while the next one is computed
    if labels is None:
        raise ValueError("expected at least one block of scores, got none")
    return labels


def outside(affine: Affine, shape: Sequence[int], grid: Grid) -> torch.Tensor:
    """Return which voxels of a grid lie outside a cropped image, (X, Y, Z) bool.

    MONAI pads what was cropped with probabilities of 0, where the first class wins. Up to a voxel
    beyond the edge, the classes at the edge still win.

    Args:
        affine: of the cropped image, voxel → world, mm.
        shape: of the cropped image, voxels.
        grid: of the label map.
    """
    matrix = np.linalg.inv(affine) @ grid.affine
    beyond = torch.zeros(tuple(grid.shape), dtype=torch.bool)
    along = [torch.arange(n, dtype=torch.float64) for n in grid.shape]
    for axis, size in enumerate(shape):
        x, y, z = (step * float(matrix[axis, number]) for number, step in enumerate(along))
        position = x[:, None, None] + y[None, :, None] + z[None, None, :] + float(matrix[axis, 3])
        beyond |= (position <= -1 + EDGE) | (position >= size - EDGE)
    return beyond
