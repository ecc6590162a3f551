"""Validation during a run: whole cases by the path of inference, scored against labels as read."""

from __future__ import annotations

from collections.abc import Sequence
from math import isnan
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events

from pipeline.config import Run
from pipeline.evaluation import dice
from pipeline.inference import Model, predict_case
from pipeline.io import read
from pipeline.networks import save_weights
from pipeline.training.distributed import from_first_process, is_first_process
from pipeline.types import Case, PathOrStr

DICE = "dice"


class Validation:
    """A handler of the trainer that scores the validation cases and keeps the run's weights.

    It adds the mean Dice over labels, `dice`, and that of each label, `dice <label>`, to the
    trainer's metrics. With `keep: best` it saves the weights whenever their Dice is the best so
    far; with `patience` it ends the run when the Dice has stopped rising.

    Args:
        model: the bundle's model around the averaged weights.
        cases: with `image` and `label`; without cases nothing is scored.
        run: gives `validate_every`, `keep` and `patience`.
        path: file of the best weights so far.
    """

    def __init__(self, model: Model, cases: Sequence[Case], run: Run, path: PathOrStr) -> None:
        self.model, self.cases, self.run, self.path = model, cases, run, Path(path)
        self.best_dice = float("-inf")
        self.validations_without_gain = 0
        self.last_iteration = -1

    def attach(self, engine: Engine) -> None:
        """Add the handlers to a trainer; Ignite calls this."""
        if self.cases:
            every = Events.EPOCH_COMPLETED(every=self.run.validate_every)
            engine.add_event_handler(every, self.validate)
            # the last weights are scored too, wherever the time limit or the patience ended the run
            engine.add_event_handler(Events.COMPLETED, self.validate)

    def validate(self, engine: Engine) -> None:
        """Score the present weights, unless that was done after this very iteration."""
        if self.last_iteration == engine.state.iteration:
            return
        self.last_iteration = engine.state.iteration
        if is_first_process():
            engine.state.metrics |= mean_dice(self.model, self.cases)
        mean = from_first_process(engine.state.metrics.get(DICE, 0.0))
        if mean > self.best_dice:
            self.best_dice, self.validations_without_gain = mean, 0
            if self.run.keep == "best" and is_first_process():
                save_weights(self.model.network, self.path)
            return
        self.validations_without_gain += 1
        if self.run.patience is not None and self.validations_without_gain >= self.run.patience:
            engine.terminate()

    def finish(self, path: PathOrStr) -> None:
        """Save the weights that the run keeps, the last or the best.

        Args:
            path: file of the bundle's weights.
        """
        if not is_first_process():
            return
        if self.run.keep == "best" and self.path.is_file():
            self.path.replace(path)
        else:
            save_weights(self.model.network, path)

    def state_dict(self) -> dict[str, Any]:
        """Return plain values for the checkpoint; the best weights have their own file."""
        return {
            "best": self.best_dice,
            "waited": self.validations_without_gain,
            "at": self.last_iteration,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.best_dice = state_dict["best"]
        self.validations_without_gain = state_dict["waited"]
        self.last_iteration = state_dict["at"]


@torch.no_grad()
def mean_dice(model: Model, cases: Sequence[Case]) -> dict[str, float]:
    """Return the mean Dice of a model on labelled cases, 0 to 1.

    Args:
        model: predicts the labels of each case.
        cases: with `image` and `label`.

    Returns:
        `dice <label>`: mean over the cases where prediction or reference has the label; missing if
        there is no such case. `dice`: mean over these labels, 0 if there is none.

    Raises:
        PipelineError: a case cannot be read or segmented.
    """
    values = {name: value for name, value in model.spec.labels.items() if value != 0}
    scores: dict[str, list[float]] = {name: [] for name in values}
    for case in cases:
        prediction = predict_case(model, case["image"]).labels
        reference = np.rint(read(case["label"]).array)
        for name, value in values.items():
            score = dice(prediction == value, reference == value)
            if not isnan(score):
                scores[name].append(score)
    means = {f"{DICE} {name}": fmean(found) for name, found in scores.items() if found}
    return {DICE: fmean(means.values()) if means else 0.0, **means}
