"""Charts: Dice of many cases, and the course of a training run."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from math import isnan
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline.evaluation.scores import ScoreRow
from pipeline.io import write_atomically

LEGEND_ENTRIES = 8  # curves that the legend has room for; further ones are drawn without a name
CURVE_DPI = 90
DICE_DPI = 110
BAR_HEIGHT_INCH = 0.14  # per case; its name is still readable


def save_figure(figure: Figure, path: Path, *, dpi: int) -> None:
    """Write a matplotlib figure as a PNG file, atomically.

    Args:
        figure: the figure.
        path: the PNG file.
        dpi: resolution, pixels per inch.
    """
    content = io.BytesIO()
    figure.savefig(content, dpi=dpi, format="png")
    write_atomically(path, content.getvalue())


def draw_dice(rows: Sequence[ScoreRow], path: Path, *, title: str = "") -> None:
    """Draw the Dice of each case and label as a bar chart, and write it as a PNG file.

    There is one panel per label and one bar per case, the lowest Dice at the bottom, and lines at
    mean and median. Cases that are not scored (Dice nan) have no bar.

    Args:
        rows: scores of all cases and labels.
        path: the PNG file.
        title: heading of the figure.
    """
    labels = list(dict.fromkeys(row.label for row in rows))
    cases = {row.case for row in rows}
    height = max(3.0, BAR_HEIGHT_INCH * len(cases) + 1.2)
    figure = Figure(figsize=(5 * len(labels), height), layout="constrained")
    panels = figure.subplots(1, len(labels), squeeze=False)[0]
    for panel, label in zip(panels, labels, strict=True):
        _draw_dice_of_label(panel, [row for row in rows if row.label == label])
        panel.set_title(label)
    figure.suptitle(title)
    save_figure(figure, path, dpi=DICE_DPI)


def _draw_dice_of_label(panel: Axes, rows: Sequence[ScoreRow]) -> None:
    scored = [row for row in rows if not isnan(row.score.dice)]
    scored.sort(key=lambda row: (row.score.dice, row.case))
    values = np.array([row.score.dice for row in scored])
    panel.barh(range(len(scored)), values, color="tab:blue", height=0.8)
    panel.set_yticks(range(len(scored)), [row.case for row in scored], fontsize=7)
    if scored:
        mean, median = float(values.mean()), float(np.median(values))
        panel.axvline(mean, color="tab:red", label=f"mean {mean:.3f}")
        panel.axvline(median, color="tab:green", ls="--", label=f"median {median:.3f}")
        panel.legend(loc="lower right", fontsize=7)  # where the bars are shortest
    panel.set(xlabel="Dice", xlim=(0, 1), ylim=(-0.6, len(scored) - 0.4))


def draw_training_curves(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw loss, Dice, seconds and learning rate over the epochs, and write them as a PNG file.

    Args:
        rows: rows of history.csv, one per epoch, with the columns `epoch`, `loss`, `seconds` and
            `learning_rate` and, for epochs with a validation, `dice` and one column `dice <label>`
            per label.
        path: the PNG file.
    """
    figure = Figure(figsize=(9, 11), layout="constrained")
    loss_panel, seconds_panel, rate_panel = figure.subplots(3, 1, sharex=True)
    epochs = [row["epoch"] for row in rows]
    loss_panel.plot(epochs, [row["loss"] for row in rows], color="tab:blue", label="training loss")
    loss_panel.set_ylabel("loss")
    dice_panel = loss_panel.twinx()
    _draw_validation(dice_panel, rows)
    lines = [*loss_panel.get_lines(), *dice_panel.get_lines()]
    # matplotlib names a line without a label "_child0" or the like
    named = [line for line in lines if not str(line.get_label()).startswith("_")]
    loss_panel.legend(named, [str(line.get_label()) for line in named], fontsize=7)
    seconds_panel.plot(epochs, [row["seconds"] for row in rows], color="tab:red")
    seconds_panel.set_ylabel("seconds per epoch")
    rate_panel.plot(epochs, [row["learning_rate"] for row in rows], color="tab:purple")
    rate_panel.set(ylabel="learning rate", xlabel="epoch")
    for panel in (loss_panel, seconds_panel, rate_panel):
        panel.grid(alpha=0.3)
    save_figure(figure, path, dpi=CURVE_DPI)


def _draw_validation(panel: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draw the mean Dice of the validation cases (bold) and that of each label (thin)."""
    names: list[str] = []
    for row in rows:
        names += [name for name in row if name.startswith("dice") and name not in names]
    for number, name in enumerate(names):
        # an epoch without validation lacks the column, or has an empty cell if read from the file
        scored = [row for row in rows if row.get(name, "") != ""]
        mean = name == "dice"
        panel.plot(
            [row["epoch"] for row in scored],
            [row[name] for row in scored],
            marker=".",
            color="tab:green" if mean else f"C{number}",
            linewidth=2 if mean else 0.7,
            label=name if number < LEGEND_ENTRIES else None,
        )
    panel.set_ylabel("Dice of validation cases")
