from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from references import Tutorial

from pipeline.errors import ReadError
from pipeline.networks import UNet
from pipeline.networks.weights import (
    SCALES,
    load_weights,
    read_checkpoint,
    read_state,
    save_state,
    save_weights,
)


def test_saved_weights_load_with_kernels_in_float16(tmp_path: Path) -> None:
    """Kernels are rounded to float16; biases and statistics are kept exactly."""
    saved, loaded = (UNet(2, 1, 2, (3, 4), norm="batch") for _ in range(2))
    saved(torch.rand(2, 1, 8, 6))
    save_weights(saved, tmp_path / "model.pt")
    load_weights(loaded, tmp_path / "model.pt")
    for name, tensor in saved.state_dict().items():
        expected = tensor.half().float() if tensor.ndim > 1 else tensor
        assert torch.equal(loaded.state_dict()[name], expected)


def test_kernels_in_int8_have_a_scale_per_slice(tmp_path: Path) -> None:
    """Each value is off by at most half a step of its slice; slices of zeros stay zeros."""
    network = UNet(3, 1, 2, (3, 4), norm="instance")
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    kernel = next(name for name, tensor in state.items() if tensor.ndim > 1)
    state[kernel][0] *= 1000
    state[kernel][1] = 0
    save_state(state, tmp_path / "half.pt")
    save_state(state, tmp_path / "int8.pt", int8=True)
    stored = torch.load(tmp_path / "int8.pt", weights_only=True)
    assert stored[kernel].dtype == torch.int8
    load_weights(network, tmp_path / "int8.pt")
    found = network.state_dict()
    for name, tensor in state.items():
        if tensor.ndim < 2:
            assert torch.equal(found[name], tensor)
            continue
        step = tensor.abs().flatten(1).amax(dim=1) / 127
        error = (found[name] - tensor).abs().flatten(1).amax(dim=1)
        assert (error <= 0.501 * step).all()
        assert error.max() > 0


def test_scales_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    network = UNet(3, 1, 2, (3, 4))
    save_state(network.state_dict(), tmp_path / "int8.pt", int8=True)
    stored = torch.load(tmp_path / "int8.pt", weights_only=True)
    name = next(name for name in stored if name.endswith(SCALES))
    for changed in (
        {**stored, name: stored[name][:1]},
        {key: value for key, value in stored.items() if key != name.removesuffix(SCALES)},
    ):
        torch.save(changed, tmp_path / "damaged.pt")
        with pytest.raises(ReadError, match=r"damaged\.pt"):
            load_weights(network, tmp_path / "damaged.pt")


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    """The message names the file and each entry that does not fit."""
    save_weights(UNet(2, 1, 2, (3, 4)), tmp_path / "model.pt")
    with pytest.raises(ReadError, match=r"model\.pt: expected weights of this network") as raised:
        load_weights(UNet(2, 1, 3, (3, 4)), tmp_path / "model.pt")
    assert "output.weight" in str(raised.value)
    assert "output.bias" in str(raised.value)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state},
        lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
    ],
    ids=["plain", "nested", "prefixed"],
)
def test_a_checkpoint_may_be_wrapped(tmp_path: Path, wrap: Callable[[Any], Any]) -> None:
    """A state dict is found under a usual key, and the prefix of DataParallel is removed."""
    state = Tutorial(features=2).state_dict()
    torch.save(wrap(state), tmp_path / "model.pt")
    assert read_checkpoint(tmp_path / "model.pt").keys() == state.keys()


@pytest.mark.parametrize("read", [read_state, read_checkpoint])
def test_files_without_weights_are_refused(tmp_path: Path, read: Callable[[Path], Any]) -> None:
    """A missing file, a file that torch did not write, and a file with more than tensors."""
    with pytest.raises(ReadError, match="cannot be read"):
        read(tmp_path / "none.pt")
    (tmp_path / "text.pt").write_text("weights")
    with pytest.raises(ReadError, match="not a plain checkpoint of tensors"):
        read(tmp_path / "text.pt")
    torch.save({"epoch": 3}, tmp_path / "other.pt")
    with pytest.raises(ReadError, match="expected a state dict"):
        read(tmp_path / "other.pt")


def test_checkpoints_may_hold_numbers_of_numpy(tmp_path: Path) -> None:
    """nnU-Net's do: the best score so far, the state of the learning rate."""
    state = Tutorial(features=2).state_dict()
    numbers = [np.float64(0.5), np.float32(1), np.int64(3), np.bool_(True), np.dtype("float32")]
    content = {"network_weights": state, "best": numbers, "trainer_name": "nnUNetTrainer"}
    torch.save(content, tmp_path / "checkpoint_final.pth")
    assert read_checkpoint(tmp_path / "checkpoint_final.pth").keys() == state.keys()
    torch.save({"state_dict": state, "best": np.zeros(3)}, tmp_path / "array.pth")
    with pytest.raises(ReadError, match="other objects are not loaded"):
        read_checkpoint(tmp_path / "array.pth")


@pytest.mark.parametrize("function", [os.mkdir, eval, getattr])
def test_no_function_of_a_pickle_is_called(tmp_path: Path, function: Callable[..., Any]) -> None:
    """Whatever it is, also inside an object that NumPy would build."""

    class Pickled:
        def __reduce__(self) -> Any:
            return function, (str(tmp_path / "mark"),)

    for content in (Pickled(), {"state_dict": {"a": Pickled()}}):
        torch.save(content, tmp_path / "model.pt")
        for read in (read_state, read_checkpoint):
            with pytest.raises(ReadError, match=r"model\.pt: is not a plain checkpoint"):
                read(tmp_path / "model.pt")
    assert not (tmp_path / "mark").exists()


def test_a_program_cannot_unlock_our_weights(tmp_path: Path) -> None:
    """The types that a checkpoint may hold are allowed while it is read, not afterwards."""
    torch.save({"a": np.float64(1)}, tmp_path / "model.pt")
    with pytest.raises(ReadError, match="expected a state dict"):
        read_checkpoint(tmp_path / "model.pt")
    with pytest.raises(ReadError, match="is not a plain checkpoint"):
        read_state(tmp_path / "model.pt")
