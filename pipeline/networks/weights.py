"""Reading and writing a network's weights.

A file of weights is a plain state dict, name → tensor, saved by torch. A kernel may be stored in
int8 together with its scales (`SCALES`); it is then read as float32. A file is always read with
`weights_only=True`, so that opening a file from an unknown source runs no code. Checkpoints of
other frameworks may also hold numbers of NumPy, such as the best score so far.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pipeline.errors import ReadError
from pipeline.io import write_atomically
from pipeline.types import PathOrStr

SCALES = ".int8_scales"  # end of the name of a kernel's scales, (N,) for a kernel (N, ...)
# Keys under which training frameworks keep the state dict in a checkpoint
CHECKPOINT_KEYS = ("state_dict", "model_state_dict", "network_weights", "model")


def _numpy_globals() -> list[Any]:
    """Return what a pickle of a NumPy number names, as numpy 1 and 2 spell it; none runs code."""
    scalar = np.float64(0).__reduce__()[0]
    modules = ("numpy.core.multiarray", "numpy._core.multiarray")
    dtypes = {type(np.dtype(code)) for code in "?bhilqBHILQefd"}
    return [*((scalar, f"{module}.scalar") for module in modules), np.dtype, *dtypes]


def read_state(path: PathOrStr) -> dict[str, torch.Tensor]:
    """Return the state dict in a file of weights.

    Raises:
        ReadError: the file is missing, damaged, was not written by torch, or holds more than
            tensors.
    """
    state = _checked_state(_load(path), path)
    for name in state:
        kernel = state.get(name.removesuffix(SCALES))
        if name.endswith(SCALES) and (kernel is None or len(kernel) != len(state[name])):
            raise ReadError(
                f"{path}: the file is damaged: the scales {name} do not fit a kernel; get the file "
                "again from where it came from"
            )
    return _from_int8(state)


def read_checkpoint(path: PathOrStr) -> dict[str, torch.Tensor]:
    """Return the state dict in a checkpoint of another framework, such as nnU-Net.

    It may stand under one of the usual keys, and its names may start with the `module.` that
    torch's DataParallel adds; both are removed.

    Raises:
        ReadError: the file is missing, was not written by torch, or holds more than tensors.
    """
    content = load_checkpoint(path)
    for key in CHECKPOINT_KEYS:
        if isinstance(content, dict):
            content = content.get(key, content)
    state = _checked_state(content, path)
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def load_checkpoint(path: PathOrStr) -> Any:
    """Return all that a checkpoint holds: tensors, NumPy numbers, and plain Python values.

    Raises:
        ReadError: the file is missing, was not written by torch, or holds other objects.
    """
    with torch.serialization.safe_globals(_numpy_globals()):
        return _load(path)


def load_weights(network: nn.Module, path: PathOrStr) -> None:
    """Load a file of weights into a network with exactly the same names and shapes.

    Raises:
        ReadError: the file cannot be read, or holds the weights of another network.
    """
    state = read_state(path)
    try:
        network.load_state_dict(state, strict=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())  # torch writes one line per entry that does not fit
        raise ReadError(f"{path}: expected weights of this network: {reason}") from error


def save_weights(network: nn.Module, path: PathOrStr) -> None:
    """Write a network's weights as `save_state` does."""
    save_state(network.state_dict(), path)


def save_state(state: Mapping[str, torch.Tensor], path: PathOrStr, *, int8: bool = False) -> None:
    """Write a state dict atomically, its kernels in float16 or in int8.

    Vectors (biases, and the scales and statistics of norms) keep their type, as they are small.

    Args:
        state: name → tensor.
        path: file to write.
        int8: whether kernels are rounded to 8 bits, which halves the file. Each slice along a
            kernel's first axis has a scale of its own, so that its largest value is 127. Only
            volseg reads such a file.
    """
    stored = {}
    for name, tensor in state.items():
        tensor = tensor.detach().cpu()
        if int8 and tensor.ndim > 1:
            largest = tensor.float().abs().flatten(start_dim=1).amax(dim=1)
            scales = torch.where(largest > 0, largest / 127, 1)
            stored[name + SCALES] = scales
            tensor = (tensor.float() / _along_first(scales, tensor)).round().to(torch.int8)
        elif tensor.ndim > 1:
            tensor = tensor.half()
        stored[name] = tensor.contiguous()
    buffer = io.BytesIO()
    torch.save(stored, buffer)
    write_atomically(Path(path), buffer.getvalue())


def _from_int8(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a state dict with the kernels that are stored in int8 as float32."""
    restored = dict(state)
    for name in [name.removesuffix(SCALES) for name in state if name.endswith(SCALES)]:
        scales = restored.pop(name + SCALES)
        restored[name] = state[name].float() * _along_first(scales, state[name])
    return restored


def _along_first(scales: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """Return scales (N,) in a shape that multiplies a kernel (N, ...) along its first axis."""
    return scales.view(-1, *[1] * (kernel.ndim - 1))


def _load(path: PathOrStr) -> Any:
    """Return what torch saved in a file, on the CPU."""
    try:
        return torch.load(Path(path), map_location="cpu", weights_only=True)
    except OSError as error:
        raise ReadError(
            f"{path}: cannot be read ({error.strerror or error}); expected a checkpoint that torch "
            "wrote"
        ) from error
    except Exception as error:  # a damaged or a hostile pickle may raise anything
        raise ReadError(
            f"{path}: is not a plain checkpoint of tensors, and other objects are not loaded, "
            "because they can run code; save one with torch.save(model.state_dict(), path)"
        ) from error


def _checked_state(content: Any, path: PathOrStr) -> dict[str, torch.Tensor]:
    if not isinstance(content, dict) or not all(map(torch.is_tensor, content.values())):
        raise ReadError(
            f"{path}: expected a state dict, name → tensor, or one under the key "
            f"{', '.join(CHECKPOINT_KEYS)}"
        )
    return content
