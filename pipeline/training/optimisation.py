"""How weights begin and change: initialisation, precision, optimizer, learning rate, time."""

from __future__ import annotations

import os
import pickle
import shutil
import time
from collections.abc import Callable, Mapping
from math import prod, sqrt
from typing import Any

import torch
from ignite.engine import Engine, Events
from ignite.handlers import EMAHandler
from monai.inferers import SimpleInferer
from monai.optimizers import WarmupCosineSchedule
from monai.utils import convert_to_tensor
from torch import nn

from pipeline.config import Run
from pipeline.errors import ConfigError
from pipeline.networks import channels_last
from pipeline.training.distributed import from_first_process, is_single_process
from pipeline.transforms import IMAGE, LABEL, WEIGHT

CONVOLUTIONS = (nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose2d, nn.ConvTranspose3d)
COMPILERS = ("g++", "clang++", "c++")


def initialise(network: nn.Module, run: Run) -> None:
    """Draws the weights of all convolutions anew as a run says, in place.

    `he`: normal with variance 2 / N, N the number of values that one output is summed from; biases 0.

    References:
        He et al.: Delving deep into rectifiers. ICCV 2015, doi:10.1109/ICCV.2015.123.
    """
    if run.initialisation == "default":
        return
    for module in network.modules():
        if isinstance(module, CONVOLUTIONS + TRANSPOSED):
            incoming = module.in_channels * prod(module.kernel_size)
            if isinstance(module, TRANSPOSED):
                incoming = max(1, incoming // prod(module.stride))
            nn.init.normal_(module.weight, std=sqrt(2 / incoming))
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def start_from(network: nn.Module, run: Run) -> None:
    """Loads the weights that a run starts from, where it names some.

    Raises:
        ConfigError: the file is not there, or its weights do not fit the network.
    """
    if run.start is None:
        return
    try:
        state = torch.load(run.start, map_location="cpu", weights_only=True)
        network.load_state_dict(
            with_added_level(state, network.state_dict()) if run.grow else state
        )
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"run.start: {run.start} holds no weights of this network: {reason}"
        ) from error


def with_added_level(
    state: Mapping[str, torch.Tensor], into: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The weights of a network with one level more on top: those that a coarser one had, and `into`'s where it had none.

    What the coarser network ended with becomes the first of the deep outputs, where there are any.
    """
    moved = {}
    for name, tensor in state.items():
        module, _, rest = name.partition(".")
        if module == "output":
            name = f"deep_outputs.0.{rest}"
        elif module != "bottleneck":
            level, _, rest = rest.partition(".")
            name = f"{module}.{int(level) + 1}.{rest}"
        moved[name] = tensor
    fits = {
        name: tensor
        for name, tensor in moved.items()
        if name in into and into[name].shape == tensor.shape
    }
    return {**into, **fits}


def compile_network(network: nn.Module, run: Run) -> None:
    """Has torch compile the network where a run asks for it, in place; the names of its weights stay.

    Raises:
        ConfigError: a network on a CPU, and no C++ compiler.
    """
    if not run.compile:
        return
    on_cpu = next(network.parameters()).device.type == "cpu"
    if on_cpu and not any(
        shutil.which(name) for name in (os.environ.get("CXX", ""), *COMPILERS) if name
    ):
        raise ConfigError(
            f"run.compile: expected a C++ compiler ({', '.join(COMPILERS)}, or $CXX); compile: false does without"
        )
    network.compile()


class TrainingInferer(SimpleInferer):
    """The network on a training batch in the precision that a run names; its logits, or lists of them, in float32."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.reduced = run.precision == "bfloat16"

    def __call__(
        self, inputs: torch.Tensor, network: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=self.reduced):
            logits = network(inputs, *args, **kwargs)
        return in_float32(logits)


def in_float32(logits: Any) -> Any:
    """Logits, or lists of them at any depth, in float32."""
    return [in_float32(level) for level in logits] if isinstance(logits, list) else logits.float()


def build_optimizer(network: nn.Module, run: Run) -> torch.optim.Optimizer:
    """The optimizer that a run names."""
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
    """The wall time of a run; stops its trainer when it is used up.

    Args:
        minutes: how long training may take; None sets no limit.
        now: the clock, seconds.
    """

    def __init__(self, minutes: float | None, now: Callable[[], float] = time.monotonic) -> None:
        self.limit = None if minutes is None else 60 * minutes
        self.now = now
        self.before = self.agreed = 0.0
        self.started: float | None = None

    def attach(self, engine: Engine) -> None:
        """Follows a trainer: ignite calls this."""
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._stop_in_time)

    def spent(self) -> float:
        """Seconds of training so far, those before the run was resumed among them; of several processes, the first one's."""
        return self.before + (self._here() if is_single_process() else self.agreed)

    def used(self) -> float:
        """The fraction of the limit that is used, 0 to 1; 0 without a limit."""
        return 0.0 if self.limit is None else min(1.0, self.spent() / self.limit)

    def _here(self) -> float:
        return 0.0 if self.started is None else self.now() - self.started

    def _start(self) -> None:
        self.started = self.now()

    def _stop_in_time(self, engine: Engine) -> None:
        self.agreed = from_first_process(self._here())
        if self.used() >= 1:
            engine.terminate()


class Schedule(WarmupCosineSchedule):
    """A learning rate that rises over the warm-up and falls to 0 along a cosine, by the steps or by the clock."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, warmup_steps: int, t_total: int, budget: Budget
    ) -> None:
        self.budget = budget
        super().__init__(optimizer, warmup_steps=warmup_steps, t_total=t_total)

    def lr_lambda(self, step: int) -> float:
        """The factor at a step, or at the one that the time used amounts to if that is later."""
        return float(super().lr_lambda(max(step, self.budget.used() * self.t_total)))

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: plain values, the seconds spent instead of the clock."""
        state = {key: value for key, value in super().state_dict().items() if key != "budget"}
        return {**state, "spent": self.budget.spent()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Puts back what `state_dict` kept."""
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "spent"})
        self.budget.before = state_dict["spent"]


def build_schedule(
    optimizer: torch.optim.Optimizer, run: Run, steps_per_epoch: int, budget: Budget
) -> Schedule:
    """The learning rate over a run, a step at a time.

    Raises:
        ConfigError: an epoch without steps.
    """
    if steps_per_epoch < 1:
        raise ConfigError(
            f"run.batch_size: a step mixes {run.cases_per_step} cases, more than the dataset gives; take a smaller batch_size"
        )
    steps = run.epochs * steps_per_epoch
    return Schedule(optimizer, max(1, round(run.warmup * steps)), steps, budget)


ALL_NEW = 1 - 1e-9  # Ignite's average asks for a momentum below 1; in float32 this is 1


def prepare_batch(
    batch: Mapping[str, torch.Tensor],
    device: torch.device | None = None,
    non_blocking: bool = False,
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


def weight_average(network: nn.Module, run: Run) -> EMAHandler:
    """The exponential moving average of the weights, which is what a run keeps; norm statistics are the last ones."""
    return EMAHandler(
        channels_last(network), momentum=min(1 - run.ema_decay, ALL_NEW), handle_buffers="copy"
    )
