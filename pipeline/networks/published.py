"""The published U-Nets that ours descends from: their weights under our names, and ours under theirs.

`tutorial`: two convolutions with bias a block, as many tutorials have it (`encoder1.0.weight`, `output.weight`).
`buda`: batch norm and convolutions without bias (`encoder1.enc1conv1.weight`, `conv.weight`), brain-segmentation-pytorch.
The original of 2015 has no PyTorch weights; it is `padding: false` in a spec.

References:
    Buda, Saha, Mazurowski: Association of genomic subtypes of lower-grade gliomas with shape features automatically extracted
    by a deep learning algorithm. Computers in Biology and Medicine 109 (2019), doi:10.1016/j.compbiomed.2019.05.002.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from pipeline.config import NetworkSpec
from pipeline.errors import ConfigError, ReadError
from pipeline.types import PathOrStr

Kind = Literal["tutorial", "buda"]
State = dict[str, torch.Tensor]
MARKS: dict[Kind, str] = {"tutorial": "encoder1.0.weight", "buda": "encoder1.enc1conv1.weight"}
NESTED = ("state_dict", "model_state_dict", "model")
NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def read_checkpoint(path: PathOrStr) -> State:
    """The state dict that a checkpoint file holds, alone or under one of the usual keys, without `module.` prefixes.

    Raises:
        ReadError: no such file, not written by torch, or more in it than tensors.
    """
    try:
        content: Any = torch.load(Path(path), map_location="cpu", weights_only=True)
    except OSError as error:
        raise ReadError(
            f"{path}: cannot be read ({error.strerror or error}); expected a checkpoint that torch wrote"
        ) from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise ReadError(
            f"{path}: is not a plain checkpoint of tensors; save one with torch.save(model.state_dict(), path)"
        ) from error
    for key in NESTED:
        content = content.get(key, content) if isinstance(content, dict) else content
    if not isinstance(content, dict) or not all(
        isinstance(tensor, torch.Tensor) for tensor in content.values()
    ):
        raise ReadError(
            f"{path}: expected a state dict, name → tensor, or one under the key {', '.join(NESTED)}"
        )
    return {name.removeprefix("module."): tensor for name, tensor in content.items()}


def recognise(state: Mapping[str, torch.Tensor]) -> Kind:
    """Which published U-Net a state dict is of, by its keys.

    Raises:
        ConfigError: neither.
    """
    for kind, mark in MARKS.items():
        if mark in state:
            return kind
    known = ", ".join(f"{mark} ({kind})" for kind, mark in MARKS.items())
    raise ConfigError(
        f"unknown weights: expected one of the keys {known}; found {', '.join(list(state)[:5])}, …"
    )


def from_published(state: Mapping[str, torch.Tensor]) -> State:
    """A published state dict under the names of `pipeline.network.UNet`, every entry used once.

    Raises:
        ConfigError: of neither kind, or keys missing or too many; the message names them.
    """
    names = key_pairs(recognise(state), _levels(state, "upconv{}.weight", 1))
    return _renamed(state, {theirs: ours for ours, theirs in names.items()})


def to_published(state: Mapping[str, torch.Tensor], kind: Kind) -> State:
    """Our state dict under the names of a published U-Net: what `load_state_dict` of that code takes, strictly.

    Raises:
        ConfigError: a network that this kind cannot express (another norm, residual blocks, deep supervision).
    """
    return _renamed(state, key_pairs(kind, _levels(state, "up.{}.weight", 0)))


def published_network(state: Mapping[str, torch.Tensor]) -> tuple[int, int, int, NetworkSpec]:
    """What the shapes of our state dict tell: spatial dimensions, channels in and out, and the U-Net's shape."""
    levels = _levels(state, "up.{}.weight", 0)
    first = state["encoder.0.body.0.weight"]
    blocks = [f"encoder.{i}" for i in range(levels)] + ["bottleneck"]
    features = tuple(int(state[f"{block}.body.0.weight"].shape[0]) for block in blocks)
    norm: Literal["batch"] | None = "batch" if "encoder.0.body.1.running_mean" in state else None
    return (
        first.ndim - 2,
        int(first.shape[1]),
        int(state["output.weight"].shape[0]),
        NetworkSpec(features=features, norm=norm),
    )


def key_pairs(kind: Kind, levels: int) -> dict[str, str]:
    """Our name → theirs of every entry of a U-Net with so many poolings: 46 of `tutorial` and 118 of `buda` with four."""
    blocks = [
        (f"{part}.{i}", f"{part}{i + 1}", f"{part[:3]}{i + 1}")
        for part in ("encoder", "decoder")
        for i in range(levels)
    ]
    blocks.append(("bottleneck", "bottleneck", "bottleneck"))
    pairs: dict[str, str] = {}
    for ours, theirs, short in blocks:
        for place in (0, 1):
            if kind == "tutorial":
                pairs |= {
                    f"{ours}.body.{2 * place}.{p}": f"{theirs}.{2 * place}.{p}"
                    for p in ("weight", "bias")
                }
            else:
                pairs[f"{ours}.body.{3 * place}.weight"] = f"{theirs}.{short}conv{place + 1}.weight"
                pairs |= {
                    f"{ours}.body.{3 * place + 1}.{p}": f"{theirs}.{short}norm{place + 1}.{p}"
                    for p in NORM
                }
    output = "output" if kind == "tutorial" else "conv"
    for p in ("weight", "bias"):
        pairs |= {f"up.{i}.{p}": f"upconv{i + 1}.{p}" for i in range(levels)}
        pairs[f"output.{p}"] = f"{output}.{p}"
    return pairs


def _levels(state: Mapping[str, torch.Tensor], pattern: str, first: int) -> int:
    count = 0
    while pattern.format(first + count) in state:
        count += 1
    return count


def _renamed(state: Mapping[str, torch.Tensor], names: Mapping[str, str]) -> State:
    missing, extra = sorted(names.keys() - state.keys()), sorted(state.keys() - names.keys())
    if missing or extra:
        found = [
            f"{word} {', '.join(keys[:5])}"
            for word, keys in (("missing", missing), ("not expected", extra))
            if keys
        ]
        raise ConfigError(
            f"the weights do not fit: {'; '.join(found)}; expected {len(names)} entries, found {len(state)}"
        )
    return {names[name]: tensor for name, tensor in state.items()}
