"""A training run that can be killed at any moment and goes on as if nothing had happened.

Every random number of an epoch follows from the run's seed and the epoch's number, so a checkpoint at the end of each epoch
holds all there is to go on from: a resumed run repeats the epoch that was cut off and ends with the same weights.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.data import set_rnd
from monai.utils import set_determinism
from torch.utils.data import Dataset

from pipeline.errors import ConfigError, PipelineError
from pipeline.io import write_atomically
from pipeline.training.distributed import is_first_process
from pipeline.types import PathOrStr

PLACES = ("bundle", "dataset")  # may be spelt otherwise, or have moved


class CheckpointHandler:
    """A handler of the trainer: seeds each epoch, keeps its end, stops where the loss is no number.

    Args:
        path: the checkpoint's file; written whole or not at all, removed when the run is complete.
        parts: name → what has a state_dict (network, average, optimizer, schedule).
        dataset: whose transforms draw random numbers.
        seed: of the run.
        settings: the run, as plain values: a checkpoint goes on with the settings that it was made with.
    """

    def __init__(
        self,
        path: PathOrStr,
        parts: Mapping[str, Any],
        dataset: Dataset[Any],
        seed: int,
        settings: Mapping[str, Any],
    ) -> None:
        self.path = Path(path)
        self.parts = dict(parts)
        self.dataset = dataset
        self.seed = seed
        self.settings = dict(settings)

    def attach(self, engine: Engine) -> None:
        """Ignite's way of adding a handler."""
        engine.add_event_handler(Events.EPOCH_STARTED, self.seed_epoch)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.stop_without_number)
        if is_first_process():
            engine.add_event_handler(Events.EPOCH_COMPLETED, self.save)
            engine.add_event_handler(Events.COMPLETED, lambda: self.path.unlink(missing_ok=True))

    def seed_epoch(self, engine: Engine) -> None:
        """Makes the epoch's random numbers follow from the run's seed, its own number, and that of the process."""
        words = [self.seed, engine.state.epoch, *([rank] if (rank := idist.get_rank()) else [])]
        seed = int(np.random.SeedSequence(words).generate_state(1)[0])
        set_determinism(seed)
        set_rnd(self.dataset, seed)

    def stop_without_number(self, engine: Engine) -> None:
        """Stops the run where the loss is nan or infinite.

        Raises:
            PipelineError: with the epoch, and where the last good weights are.
        """
        value = float(engine.state.output[0]["loss"])
        if isfinite(value):
            return
        kept = (
            f"the weights after epoch {engine.state.epoch - 1} are in {self.path}"
            if self.path.is_file()
            else "no epoch was done"
        )
        raise PipelineError(
            f"the loss became {value} in epoch {engine.state.epoch}, expected a number: {kept}; lower learning_rate, look for "
            "damaged cases with `volseg segment`, and start again"
        )

    def save(self, engine: Engine) -> None:
        """Writes the checkpoint of the epoch that ended."""
        buffer = io.BytesIO()
        state = {name: part.state_dict() for name, part in self.parts.items()}
        torch.save({"epoch": engine.state.epoch, "settings": self.settings, "state": state}, buffer)
        write_atomically(self.path, buffer.getvalue())

    def load(self, engine: Engine) -> int:
        """Puts everything back to the end of the last whole epoch, and returns its number.

        Raises:
            ConfigError: no checkpoint, or one that was made with other settings.
        """
        if not self.path.is_file():
            raise ConfigError(f"{self.path}: no such file; there is no unfinished run to resume")
        content = torch.load(self.path, map_location="cpu", weights_only=True)
        before = content["settings"]
        changed = sorted(
            key
            for key, value in self.settings.items()
            if key not in PLACES and before.get(key) != value
        )
        if changed:
            raise ConfigError(
                f"{self.path}: was made with other settings ({', '.join(changed)}); expected the same to go on"
            )
        for name, part in self.parts.items():
            part.load_state_dict(content["state"][name])
        epoch = int(content["epoch"])
        engine.state.epoch, engine.state.iteration = epoch, epoch * int(engine.state.epoch_length)
        return epoch


def checkpoint_of(handlers: Sequence[Any]) -> CheckpointHandler:
    """The checkpoint among a trainer's handlers."""
    return next(handler for handler in handlers if isinstance(handler, CheckpointHandler))
