"""Checkpoints: a run that was killed at any moment continues as if it had not been interrupted.

A checkpoint is written at the end of each epoch. All random numbers of an epoch follow from the
run's seed and the number of the epoch, so a checkpoint needs no state of a random generator. A
resumed run repeats the epoch that was interrupted and ends with the same weights.
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

PATH_SETTINGS = ("bundle", "dataset")  # may differ when a run is resumed: folders move


class CheckpointHandler:
    """An Ignite handler that seeds each epoch of training and saves a checkpoint at its end.

    It also stops the run when the loss is nan or infinite. A run that completes deletes its
    checkpoint.

    Args:
        path: file of the checkpoint.
        parts: name → object with `state_dict` and `load_state_dict` (network, optimizer, …).
        dataset: training dataset, whose random transforms are seeded.
        seed: seed of the run.
        settings: all settings of the run, as plain values. A run is only resumed if they equal
            those in the checkpoint, except for paths (`PATH_SETTINGS`).
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
        """Register the event handlers with the trainer; MONAI's `Workflow` calls this."""
        engine.add_event_handler(Events.EPOCH_STARTED, self.seed_epoch)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.check_loss)
        if is_first_process():
            engine.add_event_handler(Events.EPOCH_COMPLETED, self.save)
            engine.add_event_handler(Events.COMPLETED, lambda: self.path.unlink(missing_ok=True))

    def seed_epoch(self, engine: Engine) -> None:
        """Seed all random generators by the run's seed, the epoch and the rank of the process."""
        entropy = [self.seed, engine.state.epoch]
        rank = idist.get_rank()
        if rank > 0:
            entropy.append(rank)
        seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
        set_determinism(seed)
        # MONAI's transforms draw from numpy generators of their own, which it does not seed
        set_rnd(self.dataset, seed)

    def check_loss(self, engine: Engine) -> None:
        """Stop the run if the loss is nan or infinite.

        Raises:
            PipelineError: the loss is nan or infinite; the message holds the epoch and the path of
                the last checkpoint.
        """
        # by now MONAI has decollated the output: one dict per item of the batch, each with a copy
        # of the batch's loss
        loss = float(engine.state.output[0]["loss"])
        if isfinite(loss):
            return
        kept = "no epoch was completed"
        if self.path.is_file():
            kept = f"the weights after epoch {engine.state.epoch - 1} are in {self.path}"
        raise PipelineError(
            f"the loss became {loss} in epoch {engine.state.epoch}, expected a finite number: "
            f"{kept}; look for damaged cases with `volseg plan`, which reads every pair and names "
            "each problem, or lower learning_rate, and start again"
        )

    def save(self, engine: Engine) -> None:
        """Write the checkpoint atomically; it contains the number of the epoch that has ended."""
        state = {name: part.state_dict() for name, part in self.parts.items()}
        content = {"epoch": engine.state.epoch, "settings": self.settings, "state": state}
        buffer = io.BytesIO()
        torch.save(content, buffer)
        write_atomically(self.path, buffer.getvalue())

    def load(self, engine: Engine) -> int:
        """Load the checkpoint into `parts`, and its epoch into the engine's counters.

        Args:
            engine: the trainer, before it runs.

        Returns:
            Number of the last complete epoch, from 1.

        Raises:
            ConfigError: there is no checkpoint, or it was saved by a run with other settings.
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
