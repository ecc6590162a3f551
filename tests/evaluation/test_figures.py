"""Charts of Dice and of a training run."""

from __future__ import annotations

from math import nan
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imread

from pipeline.evaluation import figures
from pipeline.evaluation.figures import draw_dice, draw_training_curves
from pipeline.evaluation.metrics import METRICS, LabelScore
from pipeline.evaluation.scores import ScoreRow


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were drawn; they are not written, which takes a second each."""
    kept: list[Figure] = []
    monkeypatch.setattr(figures, "save_figure", lambda figure, path, dpi: kept.append(figure))
    return kept


def rows(label: str, dice_of_case: dict[str, float]) -> list[ScoreRow]:
    made = []
    for case, dice in dice_of_case.items():
        score = LabelScore(**(dict.fromkeys(METRICS, 0.5) | {"dice": dice}))
        made.append(ScoreRow(case=case, label=label, score=score))
    return made


def legend_of(panel: Axes) -> list[str]:
    legend = panel.get_legend()
    assert legend is not None
    return [text.get_text() for text in legend.get_texts()]


def test_dice_has_one_panel_per_label_and_one_bar_per_scored_case(
    drawn: list[Figure], tmp_path: Path
) -> None:
    """Sorted from the worst, with lines at mean and median; nan has no bar."""
    scores = rows("x", {"a": 0.9, "b": 0.2, "c": nan, "d": 0.7}) + rows("y", {"a": nan})
    draw_dice(scores, tmp_path / "dice.png", title="two labels")
    (figure,) = drawn
    x, y = figure.axes
    assert (x.get_title(), y.get_title()) == ("x", "y")
    assert [text.get_text() for text in x.get_yticklabels()] == ["b", "d", "a"]
    ends = [bar.get_extents().x1 for bar in x.patches]
    expected = [x.transData.transform((dice, 0))[0] for dice in (0.2, 0.7, 0.9)]
    np.testing.assert_allclose(ends, expected)
    assert legend_of(x) == ["mean 0.600", "median 0.700"]
    assert not y.patches


def test_many_labels_have_a_line_each_the_worst_first(drawn: list[Figure], tmp_path: Path) -> None:
    """At most forty, in a picture of one page; each names its mean and its worst case."""
    scores: list[ScoreRow] = []
    for number in range(138):
        scores += rows(f"label {number}", {"a": 0.99 - number / 200, "b": 0.9 - number / 200})
    scores += rows("unscored", {"a": nan})
    draw_dice(scores, tmp_path / "dice.png", title="many")
    (figure,) = drawn
    panel, means = figure.axes
    names = [text.get_text() for text in panel.get_yticklabels()]
    assert names == [f"label {number}" for number in range(137, 97, -1)]
    assert panel.get_ylim()[0] > panel.get_ylim()[1]  # the first line is at the top
    assert means.get_yticklabels()[0].get_text() == "mean 0.260 of 2, worst 0.21 in b"
    assert panel.get_title() == "the 40 labels with the lowest mean; 98 more in summary.csv"
    assert max(figure.get_size_inches()) < 12


def test_bars_are_of_the_worst_cases(drawn: list[Figure], tmp_path: Path) -> None:
    """Mean and median are those of all cases."""
    draw_dice(rows("x", {f"c{i:03}": i / 400 for i in range(400)}), tmp_path / "dice.png")
    (panel,) = drawn[0].axes
    assert len(panel.patches) == figures.BAR_CASES
    assert panel.get_title() == "x, worst 120 of 400 cases"
    assert legend_of(panel) == ["mean 0.499", "median 0.499"]


def test_the_time_of_validation_is_drawn_apart(drawn: list[Figure], tmp_path: Path) -> None:
    """Only where an epoch was validated, also as read back from history.csv."""
    history: list[dict[str, float | str]] = [
        {"epoch": 1, "loss": 1.0, "learning_rate": 0.1, "seconds": 3.0, "validation_seconds": 0},
        {"epoch": 2, "loss": 1.0, "learning_rate": 0.1, "seconds": 3.0, "validation_seconds": 9},
        {"epoch": 3, "loss": 1.0, "learning_rate": 0.1, "seconds": 3.0, "validation_seconds": ""},
    ]
    draw_training_curves(history, tmp_path / "progress.png")
    training, validation = drawn[0].axes[1].get_lines()
    np.testing.assert_array_equal(training.get_ydata(), [3, 3, 3])
    np.testing.assert_array_equal(validation.get_xdata(), [2])


def test_training_curves_draw_dice_where_epochs_were_validated(
    drawn: list[Figure], tmp_path: Path
) -> None:
    """Epochs without validation have no point; labels beyond the legend's room have no name."""
    labels = [f"dice_{i}" for i in range(10)]
    history: list[dict[str, float | str]] = []
    for epoch in range(1, 5):
        row: dict[str, float | str] = {"epoch": epoch, "loss": 1 / epoch}
        row |= {"learning_rate": 0.01, "seconds": 3.0}
        if epoch % 2 == 0:
            row |= {"dice": 0.5, **dict.fromkeys(labels, 0.4)}
        history.append(row)
    history[2] |= dict.fromkeys(["dice", *labels], "")  # as read back from history.csv
    draw_training_curves(history, tmp_path / "progress.png")
    (figure,) = drawn
    loss, dice = figure.axes[0], figure.axes[-1]
    np.testing.assert_array_equal(loss.get_lines()[0].get_xdata(), [1, 2, 3, 4])
    assert len(dice.get_lines()) == 11
    for line in dice.get_lines():
        np.testing.assert_array_equal(line.get_xdata(), [2, 4])
    assert legend_of(loss) == ["training loss", "dice", *labels[:7]]


def test_figures_are_written_as_png(tmp_path: Path) -> None:
    """Missing folders are made."""
    path = tmp_path / "new" / "dice.png"
    draw_dice(rows("x", {"a": 0.9}), path)
    assert imread(path).ndim == 3
