"""Pictures of labels over slices of a volume, in physical proportions."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke

from pipeline.evaluation.figures import save_figure
from pipeline.io import Image, LabelColor, label_table
from pipeline.types import Array, LabelMap

PLANES = ("sagittal", "coronal", "axial")  # perpendicular to the axes R, A and S
OPACITY = 0.5  # of the labels: the anatomy below them stays visible
GREY_PERCENTILES = (1.0, 99.5)  # black and white; a few bright voxels would darken all others
LEGEND_ENTRIES = 12
SIDE = re.compile(r"^(left|right|ctx-lh|ctx-rh)[ _-]+|[ _-]+(left|right)$", re.IGNORECASE)
PANEL_INCH = 4.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ComparedCase:
    """One case of `draw_worst_cases`; the three images are on one grid.

    Attributes:
        title: heading of the row.
        image: the grey values.
        prediction: the predicted output values.
        reference: the output values of the reference.
    """

    title: str
    image: Image
    prediction: Image
    reference: Image


@dataclass(frozen=True, kw_only=True, slots=True)
class _Volume:
    """Grey values and labels, reoriented to RAS.

    Attributes:
        grey: (X, Y, Z) float32.
        labels: (X, Y, Z) output values.
        spacing: (3,) mm along R, A and S.
        black: grey value that is drawn black.
        white: grey value that is drawn white.
    """

    grey: Array
    labels: Array
    spacing: Array
    black: float
    white: float


def draw_overlay(
    image: Any,
    labels: LabelMap,
    names: Mapping[str, int],
    path: Path,
    *,
    title: str = "",
    slices: int = 1,
) -> None:
    """Write a PNG of sagittal, coronal and axial slices through the labels of a volume.

    Sagittal slices have anterior on the right; coronal and axial slices have the subject's left on
    the right of the picture (radiological convention). One mm is equally long along every axis.

    Args:
        image: a three-dimensional nibabel image.
        labels: (X, Y, Z) output values on the image's grid.
        names: label → output value.
        path: the PNG.
        title: heading of the picture.
        slices: number of slices per plane, evenly spaced over the extent of the labels; a single
            one passes through their centre.
    """
    volume = _ras_volume(image, labels)
    table = _structures(names)
    positions = _slice_positions(volume.labels, slices)
    # One slice per plane makes a row of three panels; several make one row per plane.
    rows, columns = (1, len(PLANES)) if slices == 1 else (len(PLANES), slices)
    figure = _figure(rows, columns)
    panels = figure.subplots(rows, columns, squeeze=False).reshape(len(PLANES), slices)
    for axis, row in enumerate(panels):
        for panel, position in zip(row, positions[:, axis], strict=True):
            _draw_slice(panel, volume, table, axis, int(position))
    figure.suptitle(title)
    _add_legend(figure, _legend_of_labels(volume.labels, table))
    save_figure(figure, path, dpi=110 if slices == 1 else 70)


def draw_worst_cases(cases: Sequence[ComparedCase], names: Mapping[str, int], path: Path) -> None:
    """Write a PNG with one row per case: prediction as coloured areas, reference as outlines.

    Area and outline of a label have the same colour. In each plane the slice is drawn in which
    prediction and reference differ in most voxels.

    Args:
        cases: the cases, one per row.
        names: label → output value.
        path: the PNG.
    """
    table = _structures(names)
    figure = _figure(len(cases), len(PLANES))
    grid = figure.subplots(len(cases), len(PLANES), squeeze=False)
    predictions = []
    for row, case in zip(grid, cases, strict=True):
        scan = nib.Nifti1Image(np.asarray(case.image.array, dtype=np.float32), case.image.affine)
        volume = _ras_volume(scan, case.prediction.array)
        reference = _known_labels(_ras_labels(case.reference.array, case.image.affine), table)
        differs = _known_labels(volume.labels, table) != reference
        predictions.append(volume.labels.ravel())
        for axis, panel in enumerate(row):
            other_axes = tuple(other for other in range(3) if other != axis)
            position = int(differs.sum(axis=other_axes).argmax())
            _draw_slice(panel, volume, table, axis, position)
            _draw_outlines(panel, reference.take(position, axis=axis), table)
            panel.set_title(f"{case.title}\n{panel.get_title()}", fontsize=9)
    legend = _legend_of_labels(np.concatenate(predictions), table)
    _add_legend(figure, [*legend, Line2D([], [], color="black", label="outline: reference")])
    save_figure(figure, path, dpi=80)


def _figure(rows: int, columns: int) -> Figure:
    """Return an empty figure with room for the panels, the title and the legend on the right."""
    legend_inch = 2.2
    size = (PANEL_INCH * columns + legend_inch, PANEL_INCH * rows + 0.5)
    return Figure(figsize=size, layout="constrained")


def _structures(names: Mapping[str, int]) -> list[LabelColor]:
    """Return the labels that are drawn, with their colours: all but the background."""
    return [label for label in label_table(names) if label.value != 0]


def _ras_volume(image: Any, labels: Array) -> _Volume:
    """Return a nibabel image and labels on its grid, reoriented to RAS."""
    ras = nib.as_closest_canonical(image)
    grey = np.asarray(ras.dataobj, dtype=np.float32)
    black, white = np.percentile(grey, GREY_PERCENTILES)
    return _Volume(
        grey=grey,
        labels=_ras_labels(labels, image.affine),
        spacing=np.array(ras.header.get_zooms()[:3]),
        black=float(black),
        white=float(white),
    )


def _ras_labels(labels: Array, affine: Array) -> Array:
    # float32 holds output values up to 2^24 exactly; nibabel does not write all integer types
    image = nib.as_closest_canonical(nib.Nifti1Image(labels.astype(np.float32), affine))
    values: Array = np.rint(np.asarray(image.dataobj)).astype(np.int32)
    return values


def _known_labels(labels: Array, table: Sequence[LabelColor]) -> Array:
    """Return the labels with 0 for every value that the table does not have."""
    known = np.isin(labels, [label.value for label in table])
    return np.where(known, labels, 0)


def _slice_positions(labels: Array, slices: int) -> Array:
    """Return (slices, 3) voxel indices of the slices to draw along each axis."""
    voxels = np.argwhere(labels > 0)
    if not len(voxels):
        # Nothing was found: slices through the whole volume.
        voxels = np.array([np.zeros(3), np.array(labels.shape) - 1])
    if slices == 1:
        positions = voxels.mean(axis=0, keepdims=True)
    else:
        # Without the two ends, where a label is hardly more than a dot.
        positions = np.linspace(voxels.min(axis=0), voxels.max(axis=0), slices + 2)[1:-1]
    indices: Array = np.rint(positions).astype(int)
    return indices


def _draw_slice(
    panel: Axes, volume: _Volume, table: Sequence[LabelColor], axis: int, position: int
) -> None:
    """Draw one slice with its labels, and letters for the directions of the subject."""
    horizontal, vertical = (other for other in range(3) if other != axis)
    aspect = float(volume.spacing[vertical] / volume.spacing[horizontal])
    panel.imshow(
        volume.grey.take(position, axis=axis).T,
        cmap="gray",
        origin="lower",
        vmin=volume.black,
        vmax=volume.white,
        aspect=aspect,
    )
    # Nearest: between two labels there is no third.
    panel.imshow(
        _rgba(volume.labels.take(position, axis=axis).T, table),
        origin="lower",
        aspect=aspect,
        interpolation="nearest",
    )
    left, right = ("P", "A") if axis == 0 else ("R", "L")
    if axis != 0:
        panel.invert_xaxis()  # the array runs from the subject's left to right
    panel.set_axis_off()
    panel.set_title(f"{PLANES[axis]}, slice {position}", fontsize=9)
    for letter, x, side in ((left, 0.02, "left"), (right, 0.98, "right")):
        panel.text(
            x,
            0.5,
            letter,
            transform=panel.transAxes,
            color="yellow",
            fontsize=12,
            fontweight="bold",
            va="center",
            ha=side,
            path_effects=_outlined(2),
        )


def _outlined(width: float) -> list[Any]:
    """Return the effect of a black outline, for what is drawn on light and on dark ground."""
    return [withStroke(linewidth=width, foreground="black")]


def _rgba(labels: Array, table: Sequence[LabelColor]) -> Array:
    """Return (H, W, 4) colours from 0 to 1 of (H, W) output values; transparent where none is."""
    colors = np.zeros((*labels.shape, 4))
    for label in table:
        where = labels == label.value
        if where.any():
            colors[where] = (*_opaque(label), OPACITY)
    return colors


def _opaque(label: LabelColor) -> tuple[float, float, float]:
    """Return red, green and blue from 0 to 1."""
    red, green, blue = label.color
    return red / 255, green / 255, blue / 255


def _draw_outlines(panel: Axes, labels: Array, table: Sequence[LabelColor]) -> None:
    """Draw the outline of each label of an (X, Y) slice."""
    for label in table:
        mask = labels == label.value
        if mask.any():
            panel.contour(mask.T, levels=[0.5], colors=[_opaque(label)], linewidths=1.0)


def _legend_of_labels(labels: Array, table: Sequence[LabelColor]) -> list[Patch]:
    """Return legend entries of the labels that occur, the largest first.

    The two sides of a structure are one entry if they have one colour. Of more than
    `LEGEND_ENTRIES` entries the smallest are replaced by their number.
    """
    voxels = dict(zip(*np.unique(labels, return_counts=True), strict=True))
    groups: dict[tuple[tuple[int, int, int], str], list[LabelColor]] = {}
    for label in table:
        if label.value in voxels:
            groups.setdefault((label.color, SIDE.sub("", label.name)), []).append(label)

    def size(group: Sequence[LabelColor]) -> int:
        return int(sum(voxels[label.value] for label in group))

    entries = []
    for group in sorted(groups.values(), key=size, reverse=True):
        first = group[0]
        name = first.name if len(group) == 1 else SIDE.sub("", first.name)
        entries.append(Patch(facecolor=_opaque(first), edgecolor="black", label=name))
    if len(entries) > LEGEND_ENTRIES:
        shown = LEGEND_ENTRIES - 1
        rest = Patch(facecolor="none", label=f"and {len(entries) - shown} smaller")
        entries = [*entries[:shown], rest]
    return entries


def _add_legend(figure: Figure, entries: Sequence[Any]) -> None:
    if entries:
        figure.legend(handles=list(entries), loc="outside right center", fontsize=9)
