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
OPACITY = 0.5  # opacity of the labels: the anatomy below them stays visible
# percentiles that are drawn black and white: with the maximum, a few bright voxels would darken all
# others
GREY_PERCENTILES = (1.0, 99.5)
LEGEND_ENTRIES = 12
SIDE = re.compile(r"^(left|right|ctx-lh|ctx-rh)[ _-]+|[ _-]+(left|right)$", re.IGNORECASE)
PANEL_INCH = 4.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ComparedCase:
    """One case of `draw_worst_cases`; its three images are on the same grid.

    Attributes:
        title: heading of the case's row.
        image: scan.
        prediction: predicted label map.
        reference: reference label map.
    """

    title: str
    image: Image
    prediction: Image
    reference: Image


@dataclass(frozen=True, kw_only=True, slots=True)
class _Volume:
    """Grey values and labels, reoriented to RAS.

    Attributes:
        grey: (X, Y, Z) float32 grey values.
        labels: (X, Y, Z) label values.
        spacing: (3,) voxel size along R, A and S, mm.
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
    """Draw labels over sagittal, coronal and axial slices of a volume, and write a PNG file.

    Sagittal slices have anterior on the right; coronal and axial slices have the subject's left on
    the right (radiological convention). Voxels have their physical proportions.

    Args:
        image: three-dimensional nibabel image.
        labels: (X, Y, Z) label map on the image's grid.
        names: name of the label → its value in `labels`; other values are not drawn.
        path: the PNG file.
        title: heading of the figure.
        slices: number of slices per plane. Several are evenly spaced over the extent of the labels;
            a single one passes through their centre.
    """
    volume = _ras_volume(image, labels)
    table = _structures(names)
    positions = _slice_positions(volume.labels, slices)
    # a single slice per plane: one row with all planes; several slices: one row per plane
    rows, columns = (1, len(PLANES)) if slices == 1 else (len(PLANES), slices)
    figure = _figure(rows, columns)
    panels = figure.subplots(rows, columns, squeeze=False).reshape(len(PLANES), slices)
    for axis, row in enumerate(panels):
        for panel, position in zip(row, positions[:, axis], strict=True):
            _draw_slice(panel, volume, table, axis, int(position))
    figure.suptitle(title)
    _add_legend(figure, _legend_of_labels(volume.labels, table))
    save_figure(figure, path, dpi=110 if slices == 1 else 70)


def draw_worst_cases(
    cases: Sequence[ComparedCase],
    names: Mapping[str, int],
    path: Path,
    *,
    ignore_label: int | None = None,
) -> None:
    """Draw predictions as coloured areas and references as outlines, and write a PNG file.

    There is one row per case, with one slice per plane: the one in which most voxels differ. Area
    and outline of a label have the same colour.

    Args:
        cases: the cases, in the order of the rows.
        names: name of the label → its value in the label maps; other values are not drawn.
        path: the PNG file.
        ignore_label: value in the references of voxels that do not count; None if there is none.
    """
    table = _structures(names)
    figure = _figure(len(cases), len(PLANES))
    grid = figure.subplots(len(cases), len(PLANES), squeeze=False)
    drawn: list[Array] = []
    for row, case in zip(grid, cases, strict=True):
        scan = nib.Nifti1Image(np.asarray(case.image.array, dtype=np.float32), case.image.affine)
        volume = _ras_volume(scan, case.prediction.array)
        values = _ras_labels(case.reference.array, case.image.affine)
        reference = _known_labels(values, table)
        differs = _known_labels(volume.labels, table) != reference
        if ignore_label is not None:
            differs &= values != ignore_label
        drawn += [volume.labels.ravel(), reference.ravel()]
        for axis, panel in enumerate(row):
            other_axes = tuple(other for other in range(3) if other != axis)
            position = int(differs.sum(axis=other_axes).argmax())
            _draw_slice(panel, volume, table, axis, position)
            _draw_outlines(panel, reference.take(position, axis=axis), table)
            panel.set_title(f"{case.title}\n{panel.get_title()}", fontsize=9)
    legend = _legend_of_labels(np.concatenate(drawn), table)
    outline = Line2D(
        [], [], color="white", label="area: prediction\nline: reference", path_effects=_outlined(3)
    )
    _add_legend(figure, [*legend, outline])
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
    """Return a label map in which all values that are not in the table are 0."""
    known = np.isin(labels, [label.value for label in table])
    return np.where(known, labels, 0)


def _slice_positions(labels: Array, slices: int) -> Array:
    """Return (slices, 3) voxel indices of the slices to draw along each axis."""
    voxels = np.argwhere(labels > 0)
    if not len(voxels):
        # without labels, the slices are spread over the whole volume
        voxels = np.array([np.zeros(3), np.array(labels.shape) - 1])
    if slices == 1:
        positions = voxels.mean(axis=0, keepdims=True)
    else:
        # without the two ends, at which a label is hardly more than a dot
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
    # nearest neighbour, because a value between two labels would be another label
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
    """Return matplotlib's effect of a black outline, for text on light and dark ground."""
    return [withStroke(linewidth=width, foreground="black")]


def _rgba(labels: Array, table: Sequence[LabelColor]) -> Array:
    """Return (H, W, 4) colours, 0 to 1, of an (H, W) label map; background is transparent."""
    colors = np.zeros((*labels.shape, 4))
    for label in table:
        where = labels == label.value
        if where.any():
            colors[where] = (*_opaque(label), OPACITY)
    return colors


def _opaque(label: LabelColor) -> tuple[float, float, float]:
    """Return the colour of a label as red, green and blue, 0 to 1."""
    red, green, blue = label.color
    return red / 255, green / 255, blue / 255


def _draw_outlines(panel: Axes, labels: Array, table: Sequence[LabelColor]) -> None:
    """Draw the outlines of the labels in a slice, given as an (H, W) label map."""
    for label in table:
        mask = labels == label.value
        if mask.any():
            lines = panel.contour(mask.T, levels=[0.5], colors=[_opaque(label)], linewidths=1.2)
            # seen on the area of the same colour and on tissue of any brightness
            lines.set_path_effects(_outlined(2.4))


def _legend_of_labels(labels: Array, table: Sequence[LabelColor]) -> list[Patch]:
    """Return one legend entry per label that occurs, the largest structure first.

    Left and right sides of a structure share an entry if they have the same colour. If there are
    more than `LEGEND_ENTRIES` entries, the smallest ones are replaced by "and N smaller".
    """
    voxels = dict(zip(*np.unique(labels, return_counts=True), strict=True))
    # colour and name without a side → the labels of one legend entry
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
