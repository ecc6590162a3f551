"""Validation during training: whole cases, predicted as in inference and scored by Dice."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from math import isnan
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events

from pipeline.config import BundlePaths, Run
from pipeline.evaluation import dice
from pipeline.inference import Model, predict_case
from pipeline.io import read, write_atomically, write_csv
from pipeline.log import LOGGER
from pipeline.networks import save_weights
from pipeline.training.distributed import from_first_process, is_first_process
from pipeline.training.optimisation import Budget
from pipeline.transforms import crop_size
from pipeline.types import Array, Case, PathOrStr

DICE = "dice"
VALIDATION_SECONDS = "validation_seconds"

CaseDone = Callable[[int, int, str], None]
CaseScored = Callable[[str, Mapping[str, float]], None]


class Validation:
    """An Ignite handler that scores the validation cases and saves the weights that a run keeps.

    Every `validate_every` epochs and at the end of the run, each case is predicted on its file's
    own grid and compared with its label as read. The trainer's metrics get `dice`, the mean over
    labels, `dice <label>`, and `validation_seconds`, the wall time; train/validation.csv of the
    bundle has the Dice of each case and label with the weights that the run keeps. With
    `keep: best`, the weights are saved each time that `dice` is higher than before; with
    `patience`, the run ends when it has stopped rising.

    Before the final validation the weights are written to the bundle: a run that is killed during
    it has lost its scores only. A run with a time limit prepares the network and predicts one case
    before its first step, so that its budget keeps the time of the final validation. A validation
    that takes longer stops when the limit is reached, and its scores are those of the cases so far.

    Args:
        model: model whose network has the averaged weights.
        cases: validation cases, each with `image` and `label`; none turns validation off.
        run: gives `validate_every`, `keep`, `patience` and `minutes`.
        path: file of the best weights so far, for `keep: best`.
        budget: time limit of the run; None reserves no time.

    Attributes:
        case_done: called after each case of a validation with its number from 1, the number of
            cases, and the name of the case.
    """

    def __init__(
        self,
        model: Model,
        cases: Sequence[Case],
        run: Run,
        path: PathOrStr,
        budget: Budget | None = None,
    ) -> None:
        self.model, self.cases, self.run, self.path = model, cases, run, Path(path)
        self.budget = budget
        self.case_done: CaseDone = lambda number, count, name: None
        self.best_dice = float("-inf")
        self.validations_without_gain = 0
        self.last_iteration = -1

    def attach(self, engine: Engine) -> None:
        """Register the event handlers with the trainer; MONAI's `Workflow` calls this."""
        # before the validation, which can take minutes
        engine.add_event_handler(Events.COMPLETED, self._write_weights)
        if self.cases:
            if self.budget is not None and self.budget.limit is not None:
                engine.add_event_handler(Events.STARTED, self._reserve_time)
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
        seconds = 0.0
        rows: list[dict[str, Any]] = []

        def keep(case: str, scores: Mapping[str, float]) -> None:
            rows.extend({"case": case, "label": name, DICE: scores[name]} for name in scores)

        if is_first_process():
            started = time.monotonic()
            engine.state.metrics |= mean_dice(
                self.model, self.cases, self.case_done, keep, self._is_over
            )
            seconds = time.monotonic() - started
            engine.state.metrics[VALIDATION_SECONDS] = seconds
        # the other processes have no scores, but have to stop after the same step
        mean = from_first_process(engine.state.metrics.get(DICE, 0.0))
        if self.budget is not None:
            self.budget.reserve(seconds)
        if self._was_cut_short(len({row["case"] for row in rows})):
            mean = float("-inf")  # of other cases than before: it is no reason to keep weights
        if rows and (self.run.keep == "last" or mean > self.best_dice):
            write_csv(BundlePaths(self.model.root).validation_scores, rows)
        if mean > self.best_dice:
            self.best_dice, self.validations_without_gain = mean, 0
            if self.run.keep == "best" and is_first_process():
                save_weights(self.model.network, self.path)
            return
        self.validations_without_gain += 1
        if self.run.patience is not None and self.validations_without_gain >= self.run.patience:
            engine.terminate()

    def _is_over(self) -> bool:
        return self.budget is not None and self.budget.is_over()

    def _was_cut_short(self, scored: int) -> bool:
        """Return whether the time limit ended a validation before its last case; warn of it."""
        cut = is_first_process() and scored < len(self.cases)
        if cut:
            LOGGER.warning(
                "run.minutes: the time was over after %d of %d validation cases; the scores are "
                "those of these cases",
                scored,
                len(self.cases),
            )
        return bool(from_first_process(float(cut)))

    def _reserve_time(self) -> None:
        """Let the budget keep the time of the final validation, by predicting one case."""
        seconds = 0.0
        if is_first_process():
            started = time.monotonic()
            prepare_network(self.model)
            prepared = time.monotonic()
            mean_dice(self.model, self.cases[:1])
            seconds = prepared - started + len(self.cases) * (time.monotonic() - prepared)
        if self.budget is not None:
            self.budget.reserve(seconds)
            self.budget.warn_if_short()
            self.budget.start_steps()

    def _write_weights(self) -> None:
        """Write the weights that the run would keep if its final validation never ended."""
        final = BundlePaths(self.model.root).weights
        if not is_first_process():
            return
        if self.run.keep == "best" and self.path.is_file():
            write_atomically(final, self.path.read_bytes())
        else:
            save_weights(self.model.network, final)

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
def prepare_network(model: Model) -> None:
    """Compute one window, so that the network is converted for the runtime before it is timed."""
    model.network.eval()
    shape = (1, len(model.spec.channels), *crop_size(model.spec))
    model.inferer(torch.zeros(shape, device=model.device), model.network)


@torch.no_grad()
def mean_dice(
    model: Model,
    cases: Sequence[Case],
    case_done: CaseDone = lambda number, count, name: None,
    case_scored: CaseScored = lambda name, scores: None,
    is_over: Callable[[], bool] = lambda: False,
) -> dict[str, float]:
    """Return the mean Dice of a model on labelled cases, 0 to 1.

    Args:
        model: model that predicts the cases.
        cases: labelled cases, each with `image` and `label`.
        case_done: called after each case with its number from 1, the number of cases, and its name.
        case_scored: called after each case with its name, and label → Dice, nan for a label that
            neither map has.
        is_over: asked after each case whether the time is over; the other cases are then left out.

    Returns:
        `dice`, the mean over labels, 0 if no label occurs, and `dice <label>` for each label that
        occurs. Voxels with the spec's `ignore_label` do not count.
    """
    scores: dict[str, list[float]] = {name: [] for name in model.spec.values_of}
    for number, case in enumerate(cases, start=1):
        prediction = predict_case(model, case["image"]).labels
        reference = np.rint(read(case["label"]).array)
        counted = None if model.spec.ignore_label is None else reference != model.spec.ignore_label
        for name, values in model.spec.values_of.items():
            predicted, true = _mask(prediction, values), _mask(reference, values)
            if counted is not None:
                predicted, true = predicted & counted, true & counted
            scores[name].append(dice(predicted, true))
        case_scored(case["case"], {name: found[-1] for name, found in scores.items()})
        case_done(number, len(cases), case["case"])
        if is_over():
            break
    means = {}
    for name, found in scores.items():
        scored = [score for score in found if not isnan(score)]
        if scored:
            means[f"{DICE} {name}"] = fmean(scored)
    return {DICE: fmean(means.values()) if means else 0.0, **means}


def _mask(labels: Array, values: Sequence[int]) -> Array:
    """Return where a label map has one of some values; for a single value that is much faster."""
    mask: Array = labels == values[0] if len(values) == 1 else np.isin(labels, values)
    return mask
