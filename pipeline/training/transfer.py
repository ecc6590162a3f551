"""Transfer: a run that starts from the weights of another network, as far as they fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import log
from pathlib import Path

import torch
from ignite.engine import Engine, Events
from torch import nn

from pipeline.bundle import find_bundle
from pipeline.config import BundlePaths, Run, Spec, load_run, load_spec
from pipeline.errors import ConfigError, ReadError
from pipeline.log import LOGGER
from pipeline.networks import member_states, read_state
from pipeline.training.distributed import is_first_process, is_single_process
from pipeline.types import PathOrStr

State = Mapping[str, torch.Tensor]

ENCODER = ("encoder.", "bottleneck.")  # how the names of the encoder's entries begin in a U-Net
FIRST_LAYER = "encoder.0."
MAX_NAMES = 8  # so many tensors that do not fit are named in a message


def load_bundle_run(path: PathOrStr) -> Run:
    """Return the run of a bundle; a bundle that it starts from is replaced by its file of weights.

    Of a bundle with two networks, it starts from the one whose voxels are nearer in size to its
    own.

    Args:
        path: run.yaml, next to the spec.yaml of the bundle.

    Raises:
        ConfigError: a file cannot be read, or there is no such bundle or file.
    """
    run = load_run(path)
    if run.start is None:
        return run
    spec = load_spec(BundlePaths(Path(path).parent.parent).spec)
    return replace(run, start=str(starting_weights(run.start, spec)))


def starting_weights(start: str, spec: Spec | None = None) -> Path:
    """Return the file of weights that a run starts from.

    Args:
        start: such a file, or a bundle (its folder or name).
        spec: of the network that starts, which chooses between two networks of a bundle; None
            takes the first one.

    Raises:
        ConfigError: there is no such bundle or file.
    """
    if Path(start).is_file():
        return Path(start)
    try:
        paths = BundlePaths(find_bundle(start))
        # a bundle without a second network needs no spec
        if spec is None or not paths.cascade_weights.is_file():
            return paths.weights
        first = load_spec(paths.spec)
    except ConfigError as error:
        raise ConfigError(f"run.start: {error}") from error
    second = first.cascade_spec
    if second is None or not _is_nearer(spec, second, first):
        return paths.weights
    if is_first_process():
        LOGGER.info(
            "start: the second network of %s (voxels of %s mm): it is nearer to this network "
            "(%s mm) than the first one (%s mm)",
            start,
            *(_in_words(one.spacing) for one in (second, spec, first)),
        )
    return paths.cascade_weights


def _is_nearer(spec: Spec, second: Spec, first: Spec) -> bool:
    """Return whether a network starts from the second one of a bundle, instead of the first."""
    second_fits, first_fits = (
        one.network.features == spec.network.features for one in (second, first)
    )
    if second_fits != first_fits:
        return second_fits
    return _voxel_ratio(spec, second) < _voxel_ratio(spec, first)


def _voxel_ratio(spec: Spec, other: Spec) -> float:
    """Return how far two voxel sizes differ: the sum over the axes of the logarithm of the ratio.

    An axis whose spacing a spec leaves open does not count.
    """
    axes = zip(spec.spacing, other.spacing, strict=True)
    return sum(abs(log(a / b)) for a, b in axes if a is not None and b is not None)


def _in_words(spacing: Sequence[float | None]) -> str:
    return "×".join("any" if mm is None else f"{mm:g}" for mm in spacing)


def start_from(network: nn.Module, run: Run) -> None:
    """Load the weights of `run.start` into the network, as far as they fit; nothing if it is None.

    A tensor fits if the network has one of the same name and shape. The kernel of a first layer for
    another number of channels becomes the mean over the channels, scaled so that its output keeps
    its size. All other tensors keep their random values. The log has how many were loaded, and the
    names of the others.

    Args:
        network: network whose weights are replaced.
        run: gives `start`, and `grow` for weights of a U-Net with one level less.

    Raises:
        ConfigError: there is no such bundle or file, or none of its levels fits.
    """
    if run.start is None:
        return
    own = network.state_dict()
    states = fitting_states(run, own)
    loaded, averaged = {}, []
    for prefix, state in states.items():
        for name, tensor in state.items():
            target = own.get(prefix + name)
            if target is None:
                continue
            if tensor.shape == target.shape:
                loaded[prefix + name] = tensor
            elif _is_first_kernel(name, tensor, target):
                averaged.append(prefix + name)
                loaded[prefix + name] = _mean_over_channels(tensor, target)
    # a bottleneck on its own, or vectors of the same length, are no weights to start from
    kernels = [name for name, tensor in loaded.items() if tensor.ndim > 2 and name not in averaged]
    if all("bottleneck." in name for name in kernels):
        raise ConfigError(
            f"run.start: {run.start} has no weights that fit this network: {_reason(states, own)}"
        )
    network.load_state_dict({**own, **loaded})
    if is_first_process():
        _report(str(run.start), loaded, averaged, own)


def fitting_states(run: Run, own: State) -> dict[str, dict[str, torch.Tensor]]:
    """Return prefix of a member → the state dict that `run.start` has for it; "" without members.

    Members of an ensemble start from those of another one in turn, or all from a single network.

    Args:
        run: gives `start` and `grow`.
        own: state dict of the network that starts.

    Raises:
        ConfigError: there is no such bundle or file.
    """
    sources = member_states(read_start(str(run.start)))
    if run.grow:
        sources = [one_level_down(state) for state in sources]
    if not any(name.startswith("members.") for name in own):
        return {"": sources[0]}
    count = len(member_states(own))
    return {f"members.{i}.": sources[i % len(sources)] for i in range(count)}


def read_start(start: str) -> dict[str, torch.Tensor]:
    """Return the state dict of a bundle (its folder or name) or of a file of weights.

    Raises:
        ConfigError: there is no such bundle or file, or it holds no weights.
    """
    path = starting_weights(start)
    try:
        return read_state(path)
    except ReadError as error:
        raise ConfigError(f"run.start: {error}") from error


def one_level_down(state: State) -> dict[str, torch.Tensor]:
    """Return weights of a U-Net under the names that they have with one more level on top.

    The levels of the smaller network become the lower levels of the larger one, level i becoming
    level i + 1. The smaller network's output layer becomes the first layer of deep supervision,
    `deep_outputs.0`. Entries that no U-Net has are left out.

    Args:
        state: state dict of the smaller network.
    """
    renamed = {}
    for name, tensor in state.items():
        module, _, rest = name.partition(".")
        level, _, of_level = rest.partition(".")
        if module == "output":
            renamed[f"deep_outputs.0.{rest}"] = tensor
        elif module == "bottleneck":
            renamed[name] = tensor
        elif level.isdigit():
            renamed[f"{module}.{int(level) + 1}.{of_level}"] = tensor
    return renamed


def _is_first_kernel(name: str, tensor: torch.Tensor, target: torch.Tensor) -> bool:
    """Return whether two kernels of the first layer differ in the number of image channels only."""
    same_rest = tensor.shape[:1] == target.shape[:1] and tensor.shape[2:] == target.shape[2:]
    return name.startswith(FIRST_LAYER) and tensor.ndim > 2 and same_rest


def _mean_over_channels(kernel: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return a kernel for another number of channels, whose sum over them is the same."""
    mean = kernel.float().sum(dim=1, keepdim=True) / target.shape[1]
    return mean.expand_as(target).to(target.dtype)


def _reason(states: Mapping[str, State], own: State) -> str:
    """Return why no kernel fits: by the first name that both networks have, else by its names."""
    for prefix, state in states.items():
        for name, tensor in state.items():
            target = own.get(prefix + name)
            if target is not None and tensor.ndim > 1:
                return (
                    f"{name} has shape {tuple(tensor.shape)} there, {tuple(target.shape)} here "
                    "(number of features, 2D or 3D, kernel sizes)"
                )
    there = ", ".join(list(next(iter(states.values())))[:2]) or "nothing"
    return f"it has {there}, …, this network {', '.join(list(own)[:2])}, …"


def _report(start: str, loaded: State, averaged: list[str], own: State) -> None:
    """Log how many tensors were loaded, and which of the network's were not."""
    LOGGER.info("start: loaded %d of %d tensors from %s", len(loaded), len(own), start)
    if averaged:
        LOGGER.info(
            "start: %s: for another number of channels, the mean over them", ", ".join(averaged)
        )
    random = [name for name in own if name not in loaded]
    if random:
        more = f" and {len(random) - MAX_NAMES} more" if len(random) > MAX_NAMES else ""
        LOGGER.warning(
            "start: %d of %d tensors have no counterpart of their shape in %s and start from "
            "random values: %s%s",
            len(random),
            len(own),
            start,
            ", ".join(random[:MAX_NAMES]),
            more,
        )


def encoder_parameters(network: nn.Module, run: Run) -> list[nn.Parameter]:
    """Return the parameters of the encoder, to the bottleneck.

    With `run.start`, only those that are loaded from there as they are: the others are new and have
    to learn as the decoder does.

    Args:
        network: network that is trained.
        run: gives `start` and `grow`.
    """
    own = network.state_dict()
    states = {} if run.start is None else fitting_states(run, own)
    found = []
    for name, parameter in network.named_parameters():
        prefix, rest = "", name
        if name.startswith("members."):
            _, number, rest = name.split(".", maxsplit=2)
            prefix = f"members.{number}."
        if not rest.startswith(ENCODER):
            continue
        if not states or _has_shape(states[prefix].get(rest), parameter):
            found.append(parameter)
    return found


def _has_shape(tensor: torch.Tensor | None, parameter: nn.Parameter) -> bool:
    return tensor is not None and tensor.shape == parameter.shape


class EncoderFreeze:
    """An Ignite handler that leaves the encoder as it is in the first epochs of a run.

    Its parameters have no gradient then, which also saves the time to compute it. With several
    processes they keep their gradients, because each step waits for all of them; the schedule's
    learning rate of 0 for the encoder freezes it there.

    Args:
        network: network that is trained.
        run: gives `freeze_encoder`, the number of these epochs.
    """

    def __init__(self, network: nn.Module, run: Run) -> None:
        self.epochs = run.freeze_encoder
        self.parameters = encoder_parameters(network, run) if self.epochs else []

    def attach(self, engine: Engine) -> None:
        """Register the event handler with the trainer; MONAI's `Workflow` calls this."""
        if self.parameters and is_single_process():
            engine.add_event_handler(Events.EPOCH_STARTED, self.set_gradients)

    def set_gradients(self, engine: Engine) -> None:
        """Switch the gradients of the encoder off or on, for the epoch that begins."""
        for parameter in self.parameters:
            parameter.requires_grad_(engine.state.epoch > self.epochs)
