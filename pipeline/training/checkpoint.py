"""Checkpoints: a run that was killed at any moment continues as if it had not been interrupted.

All random numbers of an epoch follow from the run's seed and the number of the epoch, so the state
at the end of each epoch is enough. A resumed run repeats the epoch that was interrupted and ends
with the same weights.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
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

PATH_SETTINGS = ("bundle", "dataset")  # both may have moved, or be written relative to elsewhere


class CheckpointHandler:
    """A handler of the trainer that seeds each epoch and saves the state at its end.

    It also stops the run when the loss is not a finite number. A run that completes removes its
    checkpoint.

    Args:
        path: the checkpoint's file, written atomically.
        parts: name → object with a `state_dict` (network, average, optimizer, schedule, …).
        dataset: its random transforms are seeded.
        seed: of the run.
        settings: of the run, as plain values; a checkpoint is only resumed with equal settings.
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
        """Add the handlers to a trainer; Ignite calls this."""
        engine.add_event_handler(Events.EPOCH_STARTED, self.seed_epoch)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.check_loss)
        if is_first_process():
            engine.add_event_handler(Events.EPOCH_COMPLETED, self.save)
            engine.add_event_handler(Events.COMPLETED, lambda: self.path.unlink(missing_ok=True))

    def seed_epoch(self, engine: Engine) -> None:
        """Seed all random numbers by the run's seed, the epoch and the rank of the process."""
        entropy = [self.seed, engine.state.epoch]
        if rank := idist.get_rank():
            entropy.append(rank)
        seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
        set_determinism(seed)
        # MONAI's transforms draw from their own generators, which set_determinism does not reach
        set_rnd(self.dataset, seed)

    def check_loss(self, engine: Engine) -> None:
        """Stop the run if the loss is nan or infinite.

        Raises:
            PipelineError: with the epoch, and where the last good weights are.
        """
        loss = float(engine.state.output[0]["loss"])
        if isfinite(loss):
            return
        kept = "no epoch was completed"
        if self.path.is_file():
            kept = f"the weights after epoch {engine.state.epoch - 1} are in {self.path}"
        raise PipelineError(
            f"the loss became {loss} in epoch {engine.state.epoch}, expected a number: {kept}; "
            "lower learning_rate, look for damaged cases with `volseg segment`, and start again"
        )

    def save(self, engine: Engine) -> None:
        """Write the checkpoint of the epoch that ended."""
        state = {name: part.state_dict() for name, part in self.parts.items()}
        content = {"epoch": engine.state.epoch, "settings": self.settings, "state": state}
        buffer = io.BytesIO()
        torch.save(content, buffer)
        write_atomically(self.path, buffer.getvalue())

    def load(self, engine: Engine) -> int:
        """Restore the state at the end of the last complete epoch.

        Returns:
            The number of that epoch.

        Raises:
            ConfigError: there is no checkpoint, or it was made with other settings.
        """
        if not self.path.is_file():
            raise ConfigError(f"{self.path}: no such file; there is no unfinished run to resume")
        content = torch.load(self.path, map_location="cpu", weights_only=True)
        changed = self._changed_settings(content["settings"])
        if changed:
            raise ConfigError(
                f"{self.path}: was made with other settings ({', '.join(changed)}); "
                "resume with the settings of before, or start again with --restart"
            )
        for name, part in self.parts.items():
            part.load_state_dict(content["state"][name])
        epoch = int(content["epoch"])
        engine.state.epoch = epoch
        engine.state.iteration = epoch * int(engine.state.epoch_length)
        return epoch

    def _changed_settings(self, before: Mapping[str, Any]) -> list[str]:
        """Return the names of the settings that differ from those of a checkpoint."""
        changed = []
        for name, value in self.settings.items():
            if name not in PATH_SETTINGS and before.get(name) != value:
                changed.append(name)
        return sorted(changed)
