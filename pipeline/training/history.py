"""What a training run has been through, one row an epoch: a table, a picture, and TensorBoard where it is asked for."""

from __future__ import annotations

import time
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
from pipeline.types import PathOrStr

DRAW_EVERY = 30.0  # seconds


class History:
    """A handler of the trainer that fills `history.csv` and `progress.png` in a folder.

    A row has `epoch`, `loss` (mean over the epoch's steps), `learning_rate` (at its end), `seconds`, and what validation gave.

    Args:
        folder: where they go; made when there is something to write.
        optimizer: whose learning rate is told.
        run: whether TensorBoard's event files are written there too.

    Raises:
        ConfigError: TensorBoard is asked for and not installed.
    """

    def __init__(self, folder: PathOrStr, optimizer: torch.optim.Optimizer, run: Run) -> None:
        self.folder, self.optimizer = Path(folder), optimizer
        self.rows: list[dict[str, Any]] = []
        self.losses: list[float] = []
        self.started = self.drawn = time.monotonic()
        self.board = _board(self.folder) if run.tensorboard and is_first_process() else None

    def attach(self, engine: Engine) -> None:
        """Ignite's way of adding a handler."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._begin)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._step)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._end)
        engine.add_event_handler(Events.COMPLETED, self._complete)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Puts back what `state_dict` kept."""
        self.rows = list(state_dict["rows"])

    def _begin(self) -> None:
        self.losses, self.started = [], time.monotonic()

    def _step(self, engine: Engine) -> None:
        self.losses.append(float(engine.state.output[0]["loss"]))

    def _end(self, engine: Engine) -> None:
        row = {
            "epoch": engine.state.epoch,
            "loss": mean_over_processes(fmean(self.losses)),
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "seconds": time.monotonic() - self.started,
            **engine.state.metrics,
        }
        engine.state.metrics = {}
        self.losses = []
        self.rows.append(row)
        if not is_first_process():
            return
        write_csv(self.folder / "history.csv", self.rows)
        if self.board is not None:
            for name, value in row.items():
                self.board.add_scalar(name, value, engine.state.epoch)
        if time.monotonic() - self.drawn > DRAW_EVERY:
            self._draw()

    def _complete(self, engine: Engine) -> None:
        if self.losses:  # the clock ended the last epoch
            self._end(engine)
        elif self.rows and engine.state.metrics:
            self.rows[-1] |= engine.state.metrics
            write_csv(self.folder / "history.csv", self.rows)
        if self.rows and is_first_process():
            self._draw()
        if self.board is not None:
            self.board.close()

    def _draw(self) -> None:
        draw_training_curves(self.rows, self.folder / "progress.png")
        self.drawn = time.monotonic()


def _board(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            "run.tensorboard: is not installed; pip install 'volseg[tensorboard]'"
        ) from error
    return SummaryWriter(str(folder))
