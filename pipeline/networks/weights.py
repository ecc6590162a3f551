"""FIXME."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from pipeline.io import write_atomically
from pipeline.types import PathOrStr


def save_weights(network: nn.Module, path: PathOrStr) -> None:
    """Writes a network's weights, see `save_state`."""
    save_state(network.state_dict(), path)


def save_state(state: Mapping[str, torch.Tensor], path: PathOrStr) -> None:
    """Writes a plain state dict, whole or not at all; kernels are kept in float16, all else as it is."""
    plain = {
        name: (tensor.half() if tensor.ndim > 1 else tensor).detach().cpu().contiguous()
        for name, tensor in state.items()
    }
    buffer = io.BytesIO()
    torch.save(plain, buffer)
    write_atomically(Path(path), buffer.getvalue())
