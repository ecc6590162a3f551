"""Pictures: a volume with its labels in physical proportions, and the Dice of many cases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from pipeline.io import Image
from pipeline.types import Array, LabelMap

LEGEND = 8  # labels that a legend has room for
PLANES = (("sagittal", 0), ("coronal", 1), ("axial", 2))
FEW = 10  # labels that are drawn in a palette of their own
MANY = [
    colormaps[name](i) for name in ("tab20", "tab20b") for i in range(20)
]  # further labels come round again


def draw_overlay(
    image: Any,
    labels: LabelMap,
    names: Mapping[str, int],
    path: Path,
    *,
    title: str = "",
    slices: int = 1,
) -> None:
    """Writes a PNG of slices in three orthogonal planes through what was found, labels over grey values.

    Sagittal slices show the front on the right; coronal and axial slices show the subject's left on the picture's right, as
    radiologists read them. One mm is as long along every axis.

    Args:
        image: a nibabel image, three-dimensional.
        labels: (X, Y, Z) output values on its grid.
        names: name → output value.
        path: the PNG.
        title: the picture's heading.
        slices: how many of each plane, evenly spaced over what was found; one goes through its middle.
    """
    grey, found, spacing = _canonical(image, labels)
    where = np.argwhere(found > 0)
    low, high = (
        (where.min(axis=0), where.max(axis=0))
        if len(where)
        else (np.zeros(3), np.array(found.shape) - 1.0)
    )
    middle = where.mean(axis=0) if len(where) else (low + high) / 2
    places = np.linspace(low, high, slices + 2)[1:-1] if slices > 1 else middle[None]
    figure = Figure(figsize=(4 * max(3, slices), 4.5 if slices == 1 else 12), layout="constrained")
    axes = figure.subplots(1 if slices == 1 else 3, 3 if slices == 1 else slices).reshape(3, slices)
    coloured = _numbered(found, names)
    few = len(names) <= FEW + 1
    window = (float(np.percentile(grey, 1)), float(np.percentile(grey, 99.5)))
    for row, (_, axis) in zip(axes, PLANES, strict=True):
        for panel, place in zip(row, np.rint(places[:, axis]).astype(int), strict=True):
            _panel(
                panel,
                grey.take(place, axis=axis),
                coloured.take(place, axis=axis),
                axis,
                spacing,
                window,
                few=few,
            )
            panel.set_title(f"{PLANES[axis][0]} {place}", fontsize=9)
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110 if slices == 1 else 60)


def draw_worst_cases(
    cases: Sequence[tuple[str, Image, Image, Image]], names: Mapping[str, int], path: Path
) -> None:
    """Writes a PNG with a row a case: in three planes where they differ most, what was found and the outlines of the reference.

    Args:
        cases: a heading, the image, what was found and the reference, all on one grid.
        names: name → output value.
        path: the PNG.
    """
    figure = Figure(figsize=(12, 4 * len(cases)), layout="constrained")
    for row, (title, image, found, reference) in zip(
        figure.subplots(len(cases), 3, squeeze=False), cases, strict=True
    ):
        scan = nib.Nifti1Image(np.asarray(image.array, dtype=np.float32), image.affine)
        grey, ours, spacing = _canonical(scan, found.array)
        theirs = _canonical(scan, reference.array)[1]
        coloured, outlined = _numbered(ours, names), _numbered(np.rint(theirs), names)
        window = (float(np.percentile(grey, 1)), float(np.percentile(grey, 99.5)))
        for panel, (_, axis) in zip(row, PLANES, strict=True):
            place = int(
                (coloured != outlined).sum(axis=tuple(i for i in range(3) if i != axis)).argmax()
            )
            _panel(panel, grey.take(place, axis=axis), coloured.take(place, axis=axis), axis, spacing, window,
                   few=len(names) <= FEW + 1)  # fmt: skip
            _outline(panel, outlined.take(place, axis=axis).T)
            panel.set_title(f"{title}, {PLANES[axis][0]} {place}", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)


def _outline(panel: Axes, labels: Array) -> None:
    for number in np.unique(labels[labels > 0]):
        panel.contour(labels == number, levels=[0.5], colors="white", linewidths=0.8)


def _panel(
    panel: Axes,
    grey: Array,
    coloured: Array,
    axis: int,
    spacing: Array,
    window: tuple[float, float],
    *,
    few: bool,
) -> None:
    across, up = (i for i in range(3) if i != axis)
    aspect = float(spacing[up] / spacing[across])
    panel.imshow(grey.T, cmap="gray", origin="lower", vmin=window[0], vmax=window[1], aspect=aspect)
    colours = colormaps["tab10"] if few else ListedColormap(MANY)
    index = np.ma.masked_equal(coloured.T, 0)
    panel.imshow(
        index,
        cmap=colours,
        origin="lower",
        alpha=0.45,
        vmin=1,
        vmax=colours.N,
        aspect=aspect,
        interpolation="nearest",
    )
    if axis != 0:
        panel.invert_xaxis()
    panel.set_axis_off()
    left, right = ("P", "A") if axis == 0 else ("R", "L")
    panel.text(0.02, 0.5, left, transform=panel.transAxes, color="yellow", va="center")
    panel.text(0.98, 0.5, right, transform=panel.transAxes, color="yellow", va="center", ha="right")


def _numbered(labels: Array, names: Mapping[str, int]) -> Array:
    """The number of each voxel's colour, from 1; 0 for background."""
    coloured = np.zeros(labels.shape, dtype=np.uint8)
    for i, value in enumerate(value for value in names.values() if value != 0):
        coloured[labels == value] = i % len(MANY) + 1
    return coloured


def _canonical(image: Any, labels: LabelMap) -> tuple[Array, Array, Array]:
    """Grey values and labels turned to RAS, and the spacing there, mm."""
    upright = nib.as_closest_canonical(image)
    turned = nib.as_closest_canonical(nib.Nifti1Image(labels.astype(np.float32), image.affine))
    return (
        np.asarray(upright.dataobj, dtype=np.float32),
        np.asarray(turned.dataobj),
        np.array(upright.header.get_zooms()[:3]),
    )


def draw_training_curves(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Writes a PNG of how a run went, epoch by epoch: loss and Dice, seconds, learning rate.

    Args:
        rows: of `history.History`.
        path: the PNG.
    """
    figure = Figure(figsize=(9, 11), layout="constrained")
    top, middle, bottom = figure.subplots(3, 1, sharex=True)
    epochs = [row["epoch"] for row in rows]
    top.plot(epochs, [row["loss"] for row in rows], color="tab:blue", label="training loss")
    beside = top.twinx()
    for number, name in enumerate(
        dict.fromkeys(name for row in rows for name in row if name.startswith("dice"))
    ):
        scored = [(row["epoch"], row[name]) for row in rows if row.get(name, "") != ""]
        style: dict[str, Any] = (
            {"color": "tab:green", "lw": 2}
            if name == "dice"
            else {"color": f"C{number}", "lw": 0.7}
        )
        beside.plot(
            *zip(*scored, strict=True), marker=".", label=name if number < LEGEND else None, **style
        )
    beside.set_ylabel("Dice of validation cases")
    top.set_ylabel("loss")
    lines = top.get_lines() + [
        line for line in beside.get_lines() if not str(line.get_label()).startswith("_")
    ]
    top.legend(lines, [str(line.get_label()) for line in lines], fontsize=7)
    middle.plot(epochs, [row["seconds"] for row in rows], color="tab:red")
    middle.set_ylabel("seconds an epoch")
    bottom.plot(epochs, [row["learning_rate"] for row in rows], color="tab:purple")
    bottom.set(ylabel="learning rate", xlabel="epoch")
    for panel in (top, middle, bottom):
        panel.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)


def draw_dice(rows: Sequence[Mapping[str, Any]], path: Path, *, title: str = "") -> None:
    """Writes a PNG of each label's Dice, one bar a case from worst to best, with lines at mean and median.

    Args:
        rows: of `score.score_case`: case, label, dice; cases with nan are not drawn.
        path: the PNG.
        title: the picture's heading.
    """
    labels = list(dict.fromkeys(str(row["label"]) for row in rows))
    count = len({row["case"] for row in rows})
    figure = Figure(figsize=(5 * len(labels), max(3.0, 0.14 * count + 1.2)), layout="constrained")
    for panel, label in zip(np.atleast_1d(figure.subplots(1, len(labels))), labels, strict=True):
        scored = sorted(
            (float(row["dice"]), str(row["case"]))
            for row in rows
            if row["label"] == label and row["dice"] == row["dice"]
        )
        values = np.array([value for value, _ in scored])
        panel.barh(range(len(scored)), values, color="tab:blue", height=0.8)
        panel.set_yticks(range(len(scored)), [case for _, case in scored], fontsize=5)
        if len(scored):
            panel.axvline(values.mean(), color="tab:red", label=f"mean {values.mean():.3f}")
            panel.axvline(
                float(np.median(values)),
                color="tab:green",
                ls="--",
                label=f"median {np.median(values):.3f}",
            )
            panel.legend(loc="lower left", fontsize=7)
        panel.set(title=label, xlabel="Dice", xlim=(0, 1), ylim=(-0.6, len(scored) - 0.4))
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
