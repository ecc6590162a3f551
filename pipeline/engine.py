"""What drives the network: the parts of MONAI's trainer, and one case through MONAI's evaluator."""

from __future__ import annotations

import ctypes
import io
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.handlers import EMAHandler
from monai.data import MetaTensor, list_data_collate
from monai.engines import SupervisedEvaluator
from monai.engines.utils import IterationEvents
from monai.transforms import Compose
from monai.utils import convert_to_tensor
from torch import nn

from pipeline.border import WEIGHT
from pipeline.doubt import doubts
from pipeline.errors import ConfigError, VolumeError, mendable
from pipeline.invert import PRED, SOFT_MM3, UNCERTAINTY
from pipeline.network import channels_last
from pipeline.preprocess import IMAGE, LABEL
from pipeline.report import volumes_mm3, with_sums
from pipeline.run import Run
from pipeline.spec import Spec
from pipeline.types import Affine, Array, LabelMap, PathOrStr
from pipeline.window import NETWORK_SECONDS
from pipeline.write import write_bytes

ALL_NEW = 1 - 1e-9  # Ignite's average asks for a momentum below 1; in float32 this is 1
MALLOPT_TRIM_THRESHOLD, MALLOPT_MMAP_MAX = -1, -4  # from malloc.h


def prepare_batch(
    batch: Mapping[str, torch.Tensor], device: torch.device | None = None, non_blocking: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """A training batch on the device as plain tensors, the image in channels_last order.

    Shapes: `image` (B, C, *roi_size), `label` (B, 1, *roi_size); with a `weight` as large the target is (B, 2, *roi_size).
    """
    image, label = convert_to_tensor(batch[IMAGE]), convert_to_tensor(batch[LABEL])
    if WEIGHT in batch:
        label = torch.cat([label, convert_to_tensor(batch[WEIGHT])], dim=1)
    order = torch.channels_last_3d if image.ndim == 5 else torch.channels_last
    image = image.to(device=device, memory_format=order, non_blocking=non_blocking)
    return image, label.to(device=device, non_blocking=non_blocking)


def average(network: nn.Module, run: Run) -> EMAHandler:
    """The exponential moving average of the weights, which is what a run keeps; norm statistics are the last ones."""
    return EMAHandler(channels_last(network), momentum=min(1 - run.ema_decay, ALL_NEW), handle_buffers="copy")


def save_weights(network: nn.Module, path: PathOrStr) -> None:
    """Writes a network's weights, see `save_state`."""
    save_state(network.state_dict(), path)


def save_state(state: Mapping[str, torch.Tensor], path: PathOrStr) -> None:
    """Writes a plain state dict, whole or not at all; kernels are kept in float16, all else as it is."""
    plain = {name: (tensor.half() if tensor.ndim > 1 else tensor).detach().cpu().contiguous() for name, tensor in state.items()}
    buffer = io.BytesIO()
    torch.save(plain, buffer)
    write_bytes(Path(path), buffer.getvalue())


def keep_memory() -> None:
    """Keeps freed memory in the process (glibc): a training step frees and asks for the same gigabyte each time."""
    try:
        libc: Any = ctypes.CDLL("libc.so.6")
    except OSError:
        return
    libc.mallopt(MALLOPT_MMAP_MAX, 0)
    libc.mallopt(MALLOPT_TRIM_THRESHOLD, 2**31 - 1)


def device_of(name: str) -> torch.device:
    """The device of a name: `auto` takes a GPU where there is one.

    Raises:
        ConfigError: a device that this machine does not have.
    """
    has = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next(device for device in ("cuda", "mps", "cpu") if has[device])
    if not has.get(name.split(":")[0], False):
        raise ConfigError(f"device {name}: not on this machine; it has {', '.join(d for d in has if has[d])}")
    return torch.device(name)


@dataclass(frozen=True, kw_only=True)
class Model:
    """A bundle opened for inference: all that one case needs, loaded once.

    Attributes:
        root: the bundle's folder.
        spec: what its weights see and say.
        preprocessing: the way in; its first step reads.
        evaluator: MONAI's evaluator over the network, its inferer and the inversion.
        max_memory: bytes that the process may come to hold; None for no limit.
        uncertainty: whether each voxel's uncertainty is wanted.
    """

    root: PathOrStr
    spec: Spec
    preprocessing: Compose
    evaluator: SupervisedEvaluator
    max_memory: int | None = None
    uncertainty: bool = False


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What one case gave.

    Attributes:
        labels: (X, Y, Z) output values on the file's own grid.
        affine: the file's, voxel → RAS+ world, mm.
        header: the file's NIfTI header, empty for other formats.
        warnings: what is doubtful about the case.
        seconds: wall time of each step.
        volumes_mm3: name → volume of each structure and of the spec's sums, mm³.
        uncertainty: (X, Y, Z) from 0 to 1, the entropy of the scores, where it was asked for.
    """

    labels: LabelMap
    affine: Affine
    header: bytes
    warnings: tuple[str, ...]
    seconds: dict[str, float]
    volumes_mm3: dict[str, float]
    uncertainty: Array | None = None


@dataclass(kw_only=True)
class Prepared:
    """A case that was read and brought to the network's grid.

    Attributes:
        batch: what MONAI's evaluator takes, of one case; None once the network has taken it.
        seconds: wall time of each step.
    """

    batch: dict[Hashable, Any] | None
    seconds: dict[str, float]


def predict_case(model: Model, image: Any) -> Prediction:
    """One case through the whole path, file to labels; the command line, the bundle and the Python API all come here.

    Args:
        model: an opened bundle.
        image: a path, a nibabel or SimpleITK image, or a list of them, one a channel.

    Raises:
        PipelineError: the case cannot be read or segmented; the message says why.
    """
    return compute(model, prepare(model, image))


def prepare(model: Model, image: Any) -> Prepared:
    """The first half of `predict_case`: reading and preprocessing, which may go on beside another case's second half.

    Raises:
        PipelineError: the case cannot be read; the message says why.
    """
    started = time.perf_counter()
    with _mendable():
        case = model.preprocessing({IMAGE: image}, end=1)
        read = time.perf_counter()
        _check_channels(case[IMAGE], model.spec)
        batch = list_data_collate([model.preprocessing(case, start=1)])
    return Prepared(batch=batch, seconds={"read": read - started, "preprocess": time.perf_counter() - read})


def compute(model: Model, prepared: Prepared) -> Prediction:
    """The second half of `predict_case`: the network and the inversion.

    Raises:
        PipelineError: the case cannot be segmented; the message says why.
    """
    batch, prepared.batch = prepared.batch, None
    assert batch is not None
    marks = [time.perf_counter()]
    with _mendable():
        pred = _evaluate(model.evaluator, batch, lambda: marks.append(time.perf_counter()))
    started, network, ended = *marks, time.perf_counter()
    if NETWORK_SECONDS in pred.meta:  # blocks were inverted as they came
        network = started + float(pred.meta[NETWORK_SECONDS])
    labels, affine = pred[0].numpy(), np.asarray(pred.affine, dtype=np.float64)
    volumes = with_sums(volumes_mm3(labels, affine, model.spec.labels, pred.meta.get(SOFT_MM3)), model.spec.sums)
    return Prediction(
        labels=labels,
        affine=affine,
        header=bytes(np.asarray(pred.meta["header"], dtype=np.uint8)),
        warnings=(
            *(line for line in str(pred.meta["warnings"]).splitlines() if line),
            *doubts(labels, affine, volumes, model.spec),
        ),
        seconds=prepared.seconds | {"network": network - started, "invert": ended - network},
        volumes_mm3=volumes,
        uncertainty=np.asarray(pred.meta[UNCERTAINTY]) if UNCERTAINTY in pred.meta else None,
    )


@contextmanager
def _mendable() -> Iterator[None]:
    """Raises the PipelineError behind what MONAI's transforms and engines raise, where there is one."""
    try:
        yield
    except Exception as error:
        known = mendable(error)
        if known is None:
            raise
        raise known from error


def _check_channels(image: torch.Tensor, spec: Spec) -> None:
    if len(image) != len(spec.channels):
        raise VolumeError(f"got {len(image)} image, expected {len(spec.channels)}, one a channel: {', '.join(spec.channels)}")


def _evaluate(evaluator: SupervisedEvaluator, batch: Mapping[Hashable, Any], forward_done: Callable[[], None]) -> MetaTensor:
    """`pred` of one preprocessed case; the evaluator keeps nothing of it."""
    evaluator.data_loader = [batch]
    evaluator.state.epoch_length = 1
    try:
        with evaluator.add_event_handler(IterationEvents.FORWARD_COMPLETED, forward_done):
            evaluator.run()
        pred: MetaTensor = evaluator.state.output[0][PRED]
        return pred
    finally:
        evaluator.data_loader, evaluator.state.output, evaluator.state.batch = [], None, None
        evaluator._internal_run_generator = None  # Ignite keeps that of a run that failed: the next case would not run
