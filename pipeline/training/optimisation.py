"""How a run's weights start and change: initialisation, optimizer, learning rate, time limit."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping
from math import prod, sqrt
from typing import Any

import torch
from ignite.engine import Engine, Events
from ignite.handlers import EMAHandler
from monai.optimizers import WarmupCosineSchedule
from monai.utils import convert_to_tensor
from torch import nn

from pipeline.config import Run
from pipeline.errors import ConfigError, ReadError
from pipeline.networks import channels_last, read_state
from pipeline.training.distributed import from_first_process, is_single_process
from pipeline.transforms import IMAGE, LABEL, WEIGHT

CONVOLUTIONS = (nn.Conv2d, nn.Conv3d)
TRANSPOSED_CONVOLUTIONS = (nn.ConvTranspose2d, nn.ConvTranspose3d)
COMPILERS = ("g++", "clang++", "c++")
# Ignite's EMAHandler requires a momentum below 1. This one rounds to 1 in float32, so that the
# "average" is the last weights.
LARGEST_MOMENTUM = 1 - 1e-9


def initialise(network: nn.Module, run: Run) -> None:
    """Initialise the weights of all convolutions by the run's `initialisation`, in place.

    `default` leaves PyTorch's initial weights as they are. `he` draws them from a normal
    distribution with mean 0 and variance 2 / N, where N is the number of inputs that are summed
    for one output value, and sets the biases to 0.

    Args:
        network: network whose weights are changed.
        run: gives `initialisation`.

    References:
        He et al.: Delving deep into rectifiers. ICCV 2015, doi:10.1109/ICCV.2015.123.
    """
    if run.initialisation == "default":
        return
    for module in network.modules():
        if isinstance(module, CONVOLUTIONS + TRANSPOSED_CONVOLUTIONS):
            inputs_per_output = module.in_channels * prod(module.kernel_size)
            if isinstance(module, TRANSPOSED_CONVOLUTIONS):
                # each output voxel is a sum over only every stride-th element of the kernel
                inputs_per_output = max(1, inputs_per_output // prod(module.stride))
            nn.init.normal_(module.weight, std=sqrt(2 / inputs_per_output))
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def start_from(network: nn.Module, run: Run) -> None:
    """Load the weights file `run.start` into the network; do nothing if it is None.

    Args:
        network: network whose weights are replaced.
        run: gives `start`, and `grow` for weights of a U-Net with one level less.

    Raises:
        ConfigError: the file does not exist, or its weights do not fit the network.
    """
    if run.start is None:
        return
    try:
        state = read_state(run.start)
        if run.grow:
            state = with_added_level(state, network.state_dict())
        network.load_state_dict(state)
    except (ReadError, RuntimeError) as error:
        # the first line names the reason; torch then lists every weight that does not fit
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"run.start: {run.start} holds no weights of this network: {reason}"
        ) from error


def with_added_level(
    state: Mapping[str, torch.Tensor], into: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return weights of a U-Net that start from those of a U-Net with one level less.

    The levels of the smaller network become the lower levels of the larger one, level i becoming
    level i + 1; the new level is the top one, with the highest resolution. The smaller network's
    output layer becomes the first layer of deep supervision, `deep_outputs.0`.

    Args:
        state: state dict of the smaller network.
        into: state dict of the larger network; its entries are kept where the smaller network has
            no entry of that name and shape.
    """
    renamed = {_name_one_level_down(name): tensor for name, tensor in state.items()}
    weights = dict(into)
    for name, tensor in renamed.items():
        if name in into and into[name].shape == tensor.shape:
            weights[name] = tensor
    return weights


def _name_one_level_down(name: str) -> str:
    """Return the name that an entry of a state dict has in a U-Net with one more level on top."""
    module, _, rest = name.partition(".")
    if module == "output":
        return f"deep_outputs.0.{rest}"
    if module == "bottleneck":
        return name
    level, _, rest = rest.partition(".")
    return f"{module}.{int(level) + 1}.{rest}"


def compile_network(network: nn.Module, run: Run) -> None:
    """Apply `torch.compile` to the network in place if the run has `compile: true`.

    The keys of its state dict do not change.

    Raises:
        ConfigError: the network is on a CPU and there is no C++ compiler.
    """
    if not run.compile:
        return
    on_cpu = next(network.parameters()).device.type == "cpu"
    names = [name for name in (os.environ.get("CXX", ""), *COMPILERS) if name]
    if on_cpu and not any(shutil.which(name) for name in names):
        raise ConfigError(
            f"run.compile: expected a C++ compiler ({', '.join(COMPILERS)}, or $CXX), found none; "
            "install one, or set compile: false"
        )
    network.compile()


def build_optimizer(network: nn.Module, run: Run) -> torch.optim.Optimizer:
    """Return the run's optimizer, AdamW or SGD with momentum, over all weights of the network."""
    if run.optimizer == "sgd":
        return torch.optim.SGD(
            network.parameters(),
            lr=run.learning_rate,
            momentum=run.momentum,
            weight_decay=run.weight_decay,
        )
    return torch.optim.AdamW(
        network.parameters(), lr=run.learning_rate, weight_decay=run.weight_decay
    )


class Budget:
    """An Ignite handler that ends training when its time limit is reached.

    Args:
        minutes: largest wall time of training; None sets no limit.
        now: function that returns the time in seconds; tests pass their own.
    """

    def __init__(self, minutes: float | None, now: Callable[[], float] = time.monotonic) -> None:
        self.limit = None if minutes is None else 60 * minutes
        self.now = now
        self.seconds_before_resume = 0.0
        self.seconds_of_first_process = 0.0
        self.started: float | None = None

    def attach(self, engine: Engine) -> None:
        """Register the event handlers with the trainer; MONAI's `Workflow` calls this."""
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._stop_at_limit)

    def spent(self) -> float:
        """Return the seconds of training so far, including those before the run was resumed.

        With several processes, the clock of the first one counts in all of them, so that they have
        the same learning rate and end after the same step.
        """
        own = self._elapsed() if is_single_process() else self.seconds_of_first_process
        return self.seconds_before_resume + own

    def used(self) -> float:
        """Return the fraction of the time limit that is spent, 0 to 1; 0 without a limit."""
        return 0.0 if self.limit is None else min(1.0, self.spent() / self.limit)

    def _elapsed(self) -> float:
        return 0.0 if self.started is None else self.now() - self.started

    def _start(self) -> None:
        self.started = self.now()

    def _stop_at_limit(self, engine: Engine) -> None:
        self.seconds_of_first_process = from_first_process(self._elapsed())
        if self.used() >= 1:
            engine.terminate()


class Schedule(WarmupCosineSchedule):
    """A learning rate that rises linearly during the warm-up and then falls to 0 along a cosine.

    The progress along this curve is the fraction of the steps that are done, or the fraction of the
    time limit that is spent, whichever is larger. The learning rate is therefore 0 at the end of
    training, whether the steps or the time limit ends it.

    Args:
        optimizer: optimizer whose learning rate is set; its own is the highest of the curve.
        warmup_steps: number of steps over which the learning rate rises.
        t_total: number of steps of the whole run (MONAI's name).
        budget: time limit of the run.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, warmup_steps: int, t_total: int, budget: Budget
    ) -> None:
        self.budget = budget
        super().__init__(optimizer, warmup_steps=warmup_steps, t_total=t_total)

    def lr_lambda(self, step: int) -> float:
        """Return the factor on the highest learning rate at a step, 0 to 1."""
        return float(super().lr_lambda(max(step, self.budget.used() * self.t_total)))

    def state_dict(self) -> dict[str, Any]:
        """Return plain values for the checkpoint; of the budget only the seconds spent."""
        state = {key: value for key, value in super().state_dict().items() if key != "budget"}
        return {**state, "spent": self.budget.spent()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "spent"})
        self.budget.seconds_before_resume = state_dict["spent"]


def build_schedule(
    optimizer: torch.optim.Optimizer, run: Run, steps_per_epoch: int, budget: Budget
) -> Schedule:
    """Return the learning rate schedule of a run.

    Args:
        optimizer: optimizer whose learning rate is set.
        run: gives `epochs` and `warmup`.
        steps_per_epoch: number of training steps in an epoch.
        budget: time limit of the run, which the schedule follows too.

    Raises:
        ConfigError: an epoch has no step, because one step needs more cases than there are.
    """
    if steps_per_epoch < 1:
        raise ConfigError(
            f"run.batch_size: a step mixes {run.cases_per_step} cases, more than the dataset "
            "gives; take a smaller batch_size"
        )
    steps = run.epochs * steps_per_epoch
    return Schedule(optimizer, max(1, round(run.warmup * steps)), steps, budget)


def prepare_batch(
    batch: Mapping[str, torch.Tensor],
    device: torch.device | None = None,
    non_blocking: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return image and target of a training batch, for MONAI's `SupervisedTrainer`.

    Args:
        batch: `image` (B, C, *spatial), `label` (B, 1, *spatial) channel numbers and, for the loss
            `border_ce`, `weight` (B, 1, *spatial).
        device: device that the network is on.
        non_blocking: whether the copy to the device may run in the background.

    Returns:
        The image (B, C, *spatial), a plain tensor in channels_last order, and the target
        (B, 1, *spatial): the label; or (B, 2, *spatial): label and weight.
    """
    image, label = convert_to_tensor(batch[IMAGE]), convert_to_tensor(batch[LABEL])
    if WEIGHT in batch:
        label = torch.cat([label, convert_to_tensor(batch[WEIGHT])], dim=1)
    order = torch.channels_last_3d if image.ndim == 5 else torch.channels_last
    image = image.to(device=device, memory_format=order, non_blocking=non_blocking)
    return image, label.to(device=device, non_blocking=non_blocking)


def weight_average(network: nn.Module, run: Run) -> EMAHandler:
    """Return the handler that keeps the exponential moving average (EMA) of the weights.

    `ema_model` of the handler is what the run validates and saves. Buffers, such as the running
    statistics of batch norm, are copied from the network and not averaged.

    Args:
        network: network that is trained; its kernels are put in channels_last order, in place.
        run: gives `ema_decay`; 0 keeps the weights of the last step.
    """
    momentum = min(1 - run.ema_decay, LARGEST_MOMENTUM)
    return EMAHandler(channels_last(network), momentum=momentum, handle_buffers="copy")
