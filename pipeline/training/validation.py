"""Validation while a run goes on: whole cases through the path that ships, scored against their labels as read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from torch import nn

from pipeline.config import Run
from pipeline.evaluation import dice
from pipeline.inference import Model, predict_case
from pipeline.io import read
from pipeline.networks import save_weights
from pipeline.training.distributed import from_first_process, is_first_process
from pipeline.types import Case, PathOrStr

DICE = "dice"


class Validation:
    """A handler of the trainer: scores some cases every so many epochs, keeps the best weights, stops when they get no better.

    The mean Dice over cases and labels goes into the trainer's metrics as `dice`, each label's as `dice <label>`.

    Args:
        model: the path that ships, around the weights that a run keeps.
        cases: with `image` and `label`; without any, nothing is done.
        run: how often, what is kept, and for how long without a better score the run goes on.
        path: where the best weights so far are kept.
    """

    def __init__(self, model: Model, cases: Sequence[Case], run: Run, path: PathOrStr) -> None:
        self.model, self.cases, self.run, self.path = model, cases, run, Path(path)
        self.best, self.waited, self.at = float("-inf"), 0, -1

    def attach(self, engine: Engine) -> None:
        """Ignite's way of adding a handler."""
        if self.cases:
            engine.add_event_handler(
                Events.EPOCH_COMPLETED(every=self.run.validate_every), self.validate
            )
            engine.add_event_handler(Events.COMPLETED, self.validate)

    def validate(self, engine: Engine) -> None:
        """Scores the weights as they are, once."""
        if self.at == engine.state.iteration:
            return
        self.at = engine.state.iteration
        if is_first_process():
            engine.state.metrics |= mean_dice(self.model, self.cases)
        found = from_first_process(engine.state.metrics.get(DICE, 0.0))
        if found > self.best:
            self.best, self.waited = found, 0
            if self.run.keep == "best" and is_first_process():
                save_weights(self._network(), self.path)
            return
        self.waited += 1
        if self.run.patience is not None and self.waited >= self.run.patience:
            engine.terminate()

    def finish(self, path: PathOrStr) -> None:
        """Leaves the weights that the run keeps, the last or the best, under their final name."""
        if not is_first_process():
            return
        if self.run.keep == "best" and self.path.is_file():
            self.path.replace(path)
        else:
            save_weights(self._network(), path)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps; the best weights have a file of their own."""
        return {"best": self.best, "waited": self.waited, "at": self.at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Puts back what `state_dict` kept."""
        self.best, self.waited, self.at = state_dict["best"], state_dict["waited"], state_dict["at"]

    def _network(self) -> nn.Module:
        network: nn.Module = self.model.evaluator.network
        return network


@torch.no_grad()
def mean_dice(model: Model, cases: Sequence[Case]) -> dict[str, float]:
    """`dice`, the mean over cases and labels, and `dice <label>`, the mean over the cases where either map has it.

    Raises:
        PipelineError: a case that cannot be read or segmented.
    """
    names = [name for name, value in model.spec.labels.items() if value != 0]
    found: dict[str, list[float]] = {name: [] for name in names}
    for case in cases:
        ours, theirs = predict_case(model, case["image"]).labels, np.rint(read(case["label"]).array)
        for name in names:
            value = dice(ours == model.spec.labels[name], theirs == model.spec.labels[name])
            if value == value:
                found[name].append(value)
    means = {f"{DICE} {name}": fmean(values) for name, values in found.items() if values}
    return {DICE: fmean(means.values()) if means else 0.0, **means}
