"""Charts: Dice of many cases, and the course of a training run."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from math import isnan
from pathlib import Path
from statistics import fmean
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
BAR_LABELS = 4  # labels that fit side by side with a bar per case; more get a line per label
BAR_CASES = 120  # of a panel; a picture of more is higher than a page
BOX_LABELS = 40
BOX_HEIGHT_INCH = 0.24
BOX_NAMES = 28  # characters of a label or a case that a line has room for


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
    """Draw the Dice of all cases and labels, and write it as a PNG file.

    Up to `BAR_LABELS` labels have a panel each, with one bar per case, the lowest Dice at the
    bottom, and lines at mean and median; of many cases the `BAR_CASES` worst. More labels have a
    line each, with a box and a point per case, the label with the lowest mean first; of many labels
    the `BOX_LABELS` worst. scores.csv and summary.csv hold all. Cases that are not scored (Dice
    nan) are left out.

    Args:
        rows: scores of all cases and labels.
        path: the PNG file.
        title: heading of the figure.
    """
    scored: dict[str, list[ScoreRow]] = {row.label: [] for row in rows}
    for row in rows:
        if not isnan(row.score.dice):
            scored[row.label].append(row)
    for found in scored.values():
        found.sort(key=lambda row: (row.score.dice, row.case))
    if len(scored) <= BAR_LABELS:
        figure = _dice_bars(scored)
    else:
        figure = _dice_boxes({label: found for label, found in scored.items() if found})
    figure.suptitle(title)
    save_figure(figure, path, dpi=DICE_DPI)


def _dice_bars(scored: Mapping[str, Sequence[ScoreRow]]) -> Figure:
    """Return a figure with one panel per label and one bar per case.

    Args:
        scored: label → its scored rows, the lowest Dice first.
    """
    cases = min(BAR_CASES, max(len(rows) for rows in scored.values()))
    height = max(3.0, BAR_HEIGHT_INCH * cases + 1.2)
    figure = Figure(figsize=(5 * len(scored), height), layout="constrained")
    panels = figure.subplots(1, len(scored), squeeze=False)[0]
    for panel, (label, rows) in zip(panels, scored.items(), strict=True):
        _draw_dice_of_label(panel, rows)
        shown = f", worst {BAR_CASES} of {len(rows)} cases" if len(rows) > BAR_CASES else ""
        panel.set_title(f"{label}{shown}")
    return figure


def _draw_dice_of_label(panel: Axes, rows: Sequence[ScoreRow]) -> None:
    shown = rows[:BAR_CASES]
    panel.barh(range(len(shown)), [row.score.dice for row in shown], color="tab:blue", height=0.8)
    panel.set_yticks(range(len(shown)), [row.case for row in shown], fontsize=7)
    if rows:
        values = np.array([row.score.dice for row in rows])
        mean, median = float(values.mean()), float(np.median(values))
        panel.axvline(mean, color="tab:red", label=f"mean {mean:.3f}")
        panel.axvline(median, color="tab:green", ls="--", label=f"median {median:.3f}")
        panel.legend(loc="lower right", fontsize=7)  # where the bars are shortest
    panel.set(xlabel="Dice", xlim=(0, 1), ylim=(-0.6, max(len(shown), 1) - 0.4))


def _dice_boxes(scored: Mapping[str, Sequence[ScoreRow]]) -> Figure:
    """Return a figure with one line per label: a box, a point per case, and the worst case.

    Args:
        scored: label → its scored rows, not empty, the lowest Dice first.
    """
    values = {label: [row.score.dice for row in rows] for label, rows in scored.items()}
    worst = sorted(values, key=lambda label: fmean(values[label]))[:BOX_LABELS]
    height = BOX_HEIGHT_INCH * max(len(worst), 1) + 1.4
    figure = Figure(figsize=(10, height), layout="constrained")
    panel = figure.subplots()
    lines = range(len(worst))
    panel.boxplot(
        [values[label] for label in worst],
        positions=lines,
        orientation="horizontal",
        widths=0.6,
        showfliers=False,
        showmeans=True,
        medianprops={"color": "tab:green"},
        meanprops={"marker": "D", "markersize": 4, "markerfacecolor": "tab:red", "zorder": 3},
    )
    for line, label in zip(lines, worst, strict=True):
        found = values[label]
        panel.plot(found, [line] * len(found), ".", color="tab:blue", markersize=4, alpha=0.5)
    panel.set_yticks(lines, [_shortened(label) for label in worst], fontsize=8)
    means = panel.twinx()
    means.set_yticks(lines, [_worst_of(scored[label]) for label in worst], fontsize=7)
    for axes in (panel, means):
        axes.set_ylim(len(worst) - 0.4, -0.6)  # the worst label first
    panel.set(xlabel="Dice (green line: median, red diamond: mean)", xlim=(-0.02, 1.02))
    panel.grid(axis="x", alpha=0.3)
    left_out = len(values) - len(worst)
    if left_out:
        panel.set_title(
            f"the {len(worst)} labels with the lowest mean; {left_out} more in summary.csv",
            fontsize=9,
        )
    return figure


def _worst_of(rows: Sequence[ScoreRow]) -> str:
    """Return the mean of a label and its worst case, as text."""
    mean = fmean(row.score.dice for row in rows)
    worst = f"{rows[0].score.dice:.2f} in {_shortened(rows[0].case)}"
    return f"mean {mean:.3f} of {len(rows)}, worst {worst}"


def _shortened(name: str) -> str:
    """Return a name without its middle, if it is long."""
    if len(name) <= BOX_NAMES:
        return name
    half = (BOX_NAMES - 1) // 2
    return f"{name[:half]}…{name[-half:]}"


def draw_training_curves(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw loss, Dice, seconds and learning rate over the epochs, and write them as a PNG file.

    Args:
        rows: rows of history.csv, one per epoch, with the columns `epoch`, `loss`, `seconds` and
            `learning_rate` and, for epochs with a validation, `validation_seconds`, `dice` and one
            column `dice <label>` per label.
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
    _draw_seconds(seconds_panel, rows)
    rate_panel.plot(epochs, [row["learning_rate"] for row in rows], color="tab:purple")
    rate_panel.set(ylabel="learning rate", xlabel="epoch")
    for panel in (loss_panel, seconds_panel, rate_panel):
        panel.grid(alpha=0.3)
    save_figure(figure, path, dpi=CURVE_DPI)


def _draw_seconds(panel: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draw the seconds of training of each epoch, and those of its validation apart."""
    panel.plot(
        [row["epoch"] for row in rows],
        [row["seconds"] for row in rows],
        color="tab:red",
        label="training",
    )
    validated = [row for row in rows if row.get("validation_seconds") not in (None, "", 0)]
    if validated:
        panel.plot(
            [row["epoch"] for row in validated],
            [row["validation_seconds"] for row in validated],
            "o",
            color="tab:green",
            label="validation",
        )
        panel.legend(fontsize=7)
    panel.set_ylabel("seconds per epoch")


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
