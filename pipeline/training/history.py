"""The history of a run: a table with one row per epoch, a figure, and TensorBoard files."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from ignite.engine import Engine, Events

from pipeline.config import Run
from pipeline.errors import ConfigError
from pipeline.evaluation import draw_training_curves
from pipeline.io import write_csv
from pipeline.training.distributed import is_first_process, mean_over_processes
from pipeline.training.validation import VALIDATION_SECONDS
from pipeline.types import PathOrStr

SECONDS_BETWEEN_FIGURES = 30.0  # drawing takes about as long as a short epoch


@dataclass(frozen=True, kw_only=True, slots=True)
class EpochRow:
    """One epoch of a training run: a row of history.csv.

    Attributes:
        epoch: number of the epoch, from 1.
        loss: mean training loss over the steps of the epoch and over the processes.
        learning_rate: learning rate at the end of the epoch.
        seconds: wall time of the training steps of the epoch.
        validation_seconds: wall time of the validation after the epoch; 0 without one.
        metrics: validation metrics, `dice` (mean over labels) and `dice <label>`, 0 to 1; empty
            for an epoch without validation.
    """

    epoch: int
    loss: float
    learning_rate: float
    seconds: float
    validation_seconds: float = 0.0
    metrics: Mapping[str, float] = field(default_factory=dict)

    def columns(self) -> dict[str, Any]:
        """Return the row as written to history.csv: column → value, one column per metric."""
        return {
            "epoch": self.epoch,
            "loss": self.loss,
            "learning_rate": self.learning_rate,
            "seconds": self.seconds,
            VALIDATION_SECONDS: self.validation_seconds,
            **self.metrics,
        }

    @classmethod
    def from_columns(cls, columns: Mapping[str, Any]) -> EpochRow:
        """Return the row with the given columns; the inverse of the method `columns`."""
        rest = dict(columns)
        own = {name: rest.pop(name) for name in ("epoch", "loss", "learning_rate", "seconds")}
        # an earlier release counted the validation as a part of the epoch
        seconds = rest.pop(VALIDATION_SECONDS, 0.0)
        return cls(**own, validation_seconds=seconds, metrics=rest)


class History:
    """An Ignite handler that records each epoch of training in `history.csv` and `progress.png`.

    Args:
        folder: folder of both files; created if it does not exist.
        optimizer: optimizer whose learning rate is recorded.
        run: settings of the run; with `tensorboard`, event files are written to the folder too.

    Raises:
        ConfigError: the run asks for TensorBoard, which is not installed.
    """

    def __init__(self, folder: PathOrStr, optimizer: torch.optim.Optimizer, run: Run) -> None:
        self.folder, self.optimizer = Path(folder), optimizer
        self.rows: list[EpochRow] = []
        self.losses: list[float] = []
        self.epoch_started = self.figure_drawn = time.monotonic()
        writes_events = run.tensorboard and is_first_process()
        self.tensorboard = _tensorboard_writer(self.folder) if writes_events else None

    def attach(self, engine: Engine) -> None:
        """Register the event handlers with the trainer; MONAI's `Workflow` calls this."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._start_epoch)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._add_loss)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._add_row)
        engine.add_event_handler(Events.COMPLETED, self._complete)

    def state_dict(self) -> dict[str, Any]:
        """Return the rows as plain values, for the checkpoint."""
        return {"rows": [row.columns() for row in self.rows]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.rows = [EpochRow.from_columns(columns) for columns in state_dict["rows"]]

    def _start_epoch(self) -> None:
        self.losses, self.epoch_started = [], time.monotonic()

    def _add_loss(self, engine: Engine) -> None:
        self.losses.append(float(engine.state.output[0]["loss"]))

    def _add_row(self, engine: Engine) -> None:
        metrics = dict(engine.state.metrics)
        validation = metrics.pop(VALIDATION_SECONDS, 0.0)  # the handler before this one
        row = EpochRow(
            epoch=engine.state.epoch,
            loss=mean_over_processes(fmean(self.losses)),
            learning_rate=self.optimizer.param_groups[0]["lr"],
            seconds=max(0.0, time.monotonic() - self.epoch_started - validation),
            validation_seconds=validation,
            metrics=metrics,
        )
        # Ignite keeps metrics: without this, an epoch without validation would repeat the last ones
        engine.state.metrics = {}
        self.losses = []
        self.rows.append(row)
        if not is_first_process():
            return
        self._write_table()
        if self.tensorboard is not None:
            for name, value in row.columns().items():
                self.tensorboard.add_scalar(name, value, row.epoch)
        if time.monotonic() - self.figure_drawn > SECONDS_BETWEEN_FIGURES:
            self._draw()

    def _complete(self, engine: Engine) -> None:
        """Add the incomplete last epoch and the final validation, and draw the figure."""
        if self.losses:  # the time limit ended the last epoch before its end
            self._add_row(engine)
        elif self.rows and engine.state.metrics:  # the validation after the last epoch
            metrics = {**self.rows[-1].metrics, **engine.state.metrics}
            seconds = metrics.pop(VALIDATION_SECONDS, 0.0)
            self.rows[-1] = replace(self.rows[-1], validation_seconds=seconds, metrics=metrics)
            self._write_table()
        if self.rows and is_first_process():
            self._draw()
        if self.tensorboard is not None:
            self.tensorboard.close()

    def _write_table(self) -> None:
        write_csv(self.folder / "history.csv", [row.columns() for row in self.rows])

    def _draw(self) -> None:
        columns = [row.columns() for row in self.rows]
        draw_training_curves(columns, self.folder / "progress.png")
        self.figure_drawn = time.monotonic()


def _tensorboard_writer(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            "run.tensorboard: TensorBoard is not installed; pip install 'volseg[tensorboard]'"
        ) from error
    return SummaryWriter(str(folder))
