"""Validation during training: whole cases, predicted as in inference and scored by Dice."""

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
    """An Ignite handler that scores the validation cases and saves the weights that a run keeps.

    Every `validate_every` epochs and at the end of the run, each case is predicted on its file's
    own grid and compared with its label as read. The trainer's metrics get `dice`, the mean over
    labels, and `dice <label>`. With `keep: best`, the weights are saved each time that `dice` is
    higher than before; with `patience`, the run ends when it has stopped rising.

    Args:
        model: model whose network has the averaged weights.
        cases: validation cases, each with `image` and `label`; none turns validation off.
        run: gives `validate_every`, `keep` and `patience`.
        path: file of the best weights so far, for `keep: best`.
    """

    def __init__(self, model: Model, cases: Sequence[Case], run: Run, path: PathOrStr) -> None:
        self.model, self.cases, self.run, self.path = model, cases, run, Path(path)
        self.best_dice = float("-inf")
        self.validations_without_gain = 0
        self.last_iteration = -1

    def attach(self, engine: Engine) -> None:
        """Register the event handlers with the trainer; MONAI's `Workflow` calls this."""
        if self.cases:
            every = Events.EPOCH_COMPLETED(every=self.run.validate_every)
            engine.add_event_handler(every, self.validate)
            # the time limit or the patience may end a run between two validations
            engine.add_event_handler(Events.COMPLETED, self.validate)

    def validate(self, engine: Engine) -> None:
        """Score the present weights; save them or end the run as the class describes.

        A second call after the same iteration does nothing.
        """
        if self.last_iteration == engine.state.iteration:
            return
        self.last_iteration = engine.state.iteration
        if is_first_process():
            engine.state.metrics |= mean_dice(self.model, self.cases)
        # the other processes have no scores, but have to stop after the same step
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
        """Save the weights that the run keeps, the last ones or the best.

        Args:
            path: file that they are saved to, the bundle's model.pt.
        """
        if not is_first_process():
            return
        if self.run.keep == "best" and self.path.is_file():
            self.path.replace(path)
        else:
            save_weights(self.model.network, path)

    def state_dict(self) -> dict[str, Any]:
        """Return plain values for the checkpoint; the best weights are in a file of their own."""
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
        model: model that predicts the cases.
        cases: labelled cases, each with `image` and `label`.

    Returns:
        `dice <label>` → mean over the cases in which prediction or reference has the label; a label
        without such a case is left out. `dice` → mean over these labels, 0 without any.

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
