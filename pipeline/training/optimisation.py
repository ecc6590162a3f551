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
from torch.optim.swa_utils import get_ema_multi_avg_fn

from pipeline.config import Run
from pipeline.errors import ConfigError
from pipeline.log import LOGGER
from pipeline.networks import channels_last
from pipeline.training.distributed import from_first_process, is_first_process, is_single_process
from pipeline.training.transfer import encoder_parameters
from pipeline.transforms import IMAGE, LABEL, WEIGHT

CONVOLUTIONS = (nn.Conv2d, nn.Conv3d)
TRANSPOSED_CONVOLUTIONS = (nn.ConvTranspose2d, nn.ConvTranspose3d)
# Time before a run's clock starts (importing torch and MONAI) and after its final validation
# (writing files): seconds, and at most this fraction of the time limit
AROUND_SECONDS, AROUND = 8.0, 0.1
SHORT = 0.25  # a run with less than this fraction of its time for training steps gets a warning
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
    """Return the run's optimizer, AdamW or SGD with momentum, over all weights of the network.

    If the encoder learns at a rate of its own (`freeze_encoder`, `encoder_rate`), its parameters
    are a second group.
    """
    groups: list[dict[str, Any]] = [{"params": list(network.parameters())}]
    if run.freeze_encoder or run.encoder_rate != 1:
        encoder = encoder_parameters(network, run)
        own = {id(parameter) for parameter in encoder}
        others = [parameter for parameter in network.parameters() if id(parameter) not in own]
        groups = [
            {"params": others},
            {"params": encoder, "lr": run.learning_rate * run.encoder_rate},
        ]
    if run.optimizer == "sgd":
        return torch.optim.SGD(
            groups, lr=run.learning_rate, momentum=run.momentum, weight_decay=run.weight_decay
        )
    return torch.optim.AdamW(groups, lr=run.learning_rate, weight_decay=run.weight_decay)


class Budget:
    """An Ignite handler that ends training so early that the whole run keeps its time limit.

    The clock starts when the object is made, before the cases are read. Time is kept for what comes
    after the last step: the final validation (`reserve`), and the start and end of the process.

    Args:
        minutes: largest wall time of the whole run; None sets no limit.
        now: function that returns the time in seconds; tests pass their own.

    Attributes:
        limit: time limit of the run, seconds; None for none.
        reserved: seconds that are kept for the time after the last step.
    """

    def __init__(self, minutes: float | None, now: Callable[[], float] = time.monotonic) -> None:
        self.limit = None if minutes is None else 60 * minutes
        self.now = now
        self.seconds_before_resume = 0.0
        self.seconds_of_first_process = 0.0
        self.reserved = 0.0
        # seconds of the process before the clock starts, and after the final validation
        self.around = 0.0 if self.limit is None else min(AROUND_SECONDS, AROUND * self.limit)
        self.clock_started = now()
        self.spent_before_steps = 0.0

    def attach(self, engine: Engine) -> None:
        """Register the event handlers with the trainer; MONAI's `Workflow` calls this."""
        engine.add_event_handler(Events.STARTED, self.start_steps)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._stop_at_limit)

    def reserve(self, seconds: float) -> None:
        """Keep seconds for the final validation; with several processes, those of the first one.

        Every process has to call this.
        """
        self.reserved = from_first_process(seconds)

    def warn_if_short(self) -> None:
        """Log a warning if what is reserved leaves little of the time limit for training steps."""
        if self.limit is None or not is_first_process():
            return
        other = self.spent() + self.reserved + self.around
        if self.limit - other < SHORT * self.limit:
            LOGGER.warning(
                "run.minutes: %.1f minutes are too short: reading the cases took %.0f s and the "
                "final validation takes %.0f s, which leaves %.0f s for training; take %.1f "
                "minutes or more, or set validate_every: 0",
                self.limit / 60,
                self.spent(),
                self.reserved,
                max(0.0, self.limit - other),
                other / (1 - SHORT) / 60,
            )

    def spent(self) -> float:
        """Return the seconds of the run so far, including those before it was resumed.

        With several processes, the clock of the first one counts in all of them, so that they have
        the same learning rate and end after the same step.
        """
        own = self._elapsed() if is_single_process() else self.seconds_of_first_process
        return self.seconds_before_resume + own

    def is_over(self) -> bool:
        """Return whether the whole time limit is spent, by the clock of this process."""
        if self.limit is None:
            return False
        return self.seconds_before_resume + self._elapsed() >= self.limit - self.around / 2

    def used(self) -> float:
        """Return the fraction of the time for training steps that is spent, 0 to 1.

        It is 0 without a limit.
        """
        if self.limit is None:
            return 0.0
        time_for_steps = self.limit - self.reserved - self.around - self.spent_before_steps
        if time_for_steps <= 0:
            return 1.0
        return min(1.0, max(0.0, self.spent() - self.spent_before_steps) / time_for_steps)

    def _elapsed(self) -> float:
        return self.now() - self.clock_started

    def start_steps(self) -> None:
        """Note that the first step begins now: what was spent before is no time for steps."""
        self.seconds_of_first_process = from_first_process(self._elapsed())
        # of a resumed run, the steps before count as time for steps
        self.spent_before_steps = self.spent() - self.seconds_before_resume

    def _stop_at_limit(self, engine: Engine) -> None:
        self.seconds_of_first_process = from_first_process(self._elapsed())
        if self.used() >= 1:
            engine.terminate()


class Schedule(WarmupCosineSchedule):
    """A learning rate that rises linearly during the warm-up and then falls to 0 along a cosine.

    The progress along this curve is the fraction of the steps that are done, or the fraction of the
    time limit that is spent, whichever is larger. The learning rate is therefore 0 at the end of
    training, whether the steps or the time limit ends it. Of a second group of parameters, the
    encoder's, it is 0 in the first `frozen_steps`.

    Args:
        optimizer: optimizer whose learning rate is set; its own is the highest of the curve.
        warmup_steps: number of steps over which the learning rate rises.
        t_total: number of steps of the whole run (MONAI's name).
        budget: time limit of the run.
        frozen_steps: number of steps in which the encoder is frozen.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        warmup_steps: int,
        t_total: int,
        budget: Budget,
        frozen_steps: int = 0,
    ) -> None:
        self.budget, self.frozen_steps = budget, frozen_steps
        super().__init__(optimizer, warmup_steps=warmup_steps, t_total=t_total)
        self.lr_lambdas[1:] = [self.encoder_lambda for _ in optimizer.param_groups[1:]]

    def lr_lambda(self, step: int) -> float:
        """Return the factor on the highest learning rate at a step, 0 to 1."""
        return float(super().lr_lambda(max(step, self.budget.used() * self.t_total)))

    def encoder_lambda(self, step: int) -> float:
        """Return the factor on the encoder's highest learning rate at a step, 0 to 1."""
        return 0.0 if step < self.frozen_steps else self.lr_lambda(step)

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
        run: gives `epochs`, `warmup` and `freeze_encoder`.
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
    return Schedule(
        optimizer,
        max(1, round(run.warmup * steps)),
        steps,
        budget,
        run.freeze_encoder * steps_per_epoch,
    )


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


class WarmUpAverage(EMAHandler):
    """Ignite's moving average of weights, with a lower decay in the first steps.

    After t steps the decay is at most (1 + t) / (10 + t). The average of a short run is then one
    over a fraction of its own steps, not mostly the random initial weights. Buffers are copied.
    """

    def _update_ema_model(self, engine: Engine, name: str) -> None:
        momentum = max(self.momentum, 9 / (10 + engine.state.iteration))
        setattr(engine.state, name, momentum)
        average = get_ema_multi_avg_fn(1 - momentum)  # type: ignore[no-untyped-call]
        average(list(self.ema_model.parameters()), list(self.model.parameters()), None)
        for kept, current in zip(self.ema_model.buffers(), self.model.buffers(), strict=True):
            kept.data = current.data


def weight_average(network: nn.Module, run: Run) -> EMAHandler:
    """Return the handler that keeps the exponential moving average (EMA) of the weights.

    `ema_model` of the handler is what the run validates and saves. Buffers, such as the running
    statistics of batch norm, are copied from the network and not averaged.

    Args:
        network: network that is trained; its kernels are put in channels_last order, in place.
        run: gives `ema_decay`; 0 keeps the weights of the last step.
    """
    momentum = min(1 - run.ema_decay, LARGEST_MOMENTUM)
    return WarmUpAverage(channels_last(network), momentum=momentum, handle_buffers="copy")
