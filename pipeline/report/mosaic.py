"""Mosaics: slices of a case in three planes, in physical proportions, with outlines of the labels.

Left is on the right of axial and coronal slices (radiological convention); sagittal slices have
anterior on the right. The slices follow the axes of the scan. A mosaic is two pictures of one size,
the scan and the outlines, so that a reader can switch the outlines off.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image as Picture
from PIL import ImageDraw, ImageFont

from pipeline.io import LabelColor
from pipeline.report.shown_volume import ShownVolume
from pipeline.types import Array

# rows from top to bottom: axis that the plane is perpendicular to, axes to the right and up,
# letters at the left, right, top and bottom
PLANES: Mapping[str, tuple[int, int, int, str]] = {
    "axial": (2, 0, 1, "RLAP"),
    "coronal": (1, 0, 2, "RLSI"),
    "sagittal": (0, 1, 2, "PASI"),
}
POSITIVE, NEGATIVE = "RAS", "LPI"
COLUMNS = 6
# of the extent of the labels: slices nearer to the ends show hardly more than a dot
FIRST, LAST = 0.14, 0.86
WIDTH = 1320  # pixels of the whole mosaic: 1.1 per mm for a brain
GAP = 4  # pixels between panels
LETTER_PIXELS, NUMBER_PIXELS = 15, 12
LETTER_GREY, NUMBER_GREY = 235, 170
QUALITY = 82  # of lossy WebP
EFFORT = 2  # of WebP, 0 to 6: more takes longer for files that are hardly smaller


@dataclass(frozen=True, kw_only=True, slots=True)
class Panel:
    """One slice in a mosaic.

    Attributes:
        plane: axial, coronal or sagittal.
        index: of the slice along its axis, in the shown volume.
        left, top, width, height: its place, pixels.
    """

    plane: str
    index: int
    left: int
    top: int
    width: int
    height: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Mosaic:
    """The pictures of one case.

    Attributes:
        scan: (H, W) uint8.
        outlines: (H, W, 4) uint8, red, green, blue and opacity.
        panels: what is where.
    """

    scan: Array
    outlines: Array
    panels: Sequence[Panel]


def draw_mosaic(shown: ShownVolume, table: Sequence[LabelColor]) -> Mosaic:
    """Return the mosaic of a case.

    Args:
        shown: the case.
        table: colours of the labels; values that are not in it are not outlined.
    """
    extent = [size * mm for size, mm in zip(shown.grey.shape, shown.spacing, strict=True)]
    column_mm = max(extent[right] for _, right, _, _ in PLANES.values())
    scale = (WIDTH / COLUMNS - GAP) / column_mm  # pixels per mm
    panels = _layout(shown, extent, scale)
    height = max(panel.top + panel.height for panel in panels)
    scan = np.zeros((height, WIDTH), dtype=np.uint8)
    outlines = np.zeros((height, WIDTH, 4), dtype=np.uint8)
    colors, values = _palette(table)
    for panel in panels:
        where = (
            slice(panel.top, panel.top + panel.height),
            slice(panel.left, panel.left + panel.width),
        )
        scan[where] = _scan_panel(shown, panel)
        outlines[where] = colors[_outlined(_label_panel(shown, panel), values)]
    return Mosaic(scan=_with_letters(scan, panels, shown), outlines=outlines, panels=panels)


def encode_mosaic(mosaic: Mosaic) -> tuple[bytes, bytes]:
    """Return a mosaic as two WebP files: the scan, and the outlines without loss."""
    return (
        _webp(Picture.fromarray(mosaic.scan), quality=QUALITY),
        _webp(Picture.fromarray(mosaic.outlines), lossless=True),
    )


def _webp(picture: Picture.Image, **options: int | bool) -> bytes:
    content = io.BytesIO()
    picture.save(content, format="WEBP", method=EFFORT, **options)
    return content.getvalue()


def _layout(shown: ShownVolume, extent: Sequence[float], scale: float) -> list[Panel]:
    panels, top = [], 0
    for plane, (axis, right, up, _) in PLANES.items():
        width, height = (max(1, round(extent[other] * scale)) for other in (right, up))
        for column, index in enumerate(slice_indices(shown.labels, axis)):
            left = round(column * WIDTH / COLUMNS) + (WIDTH // COLUMNS - width) // 2
            panels.append(
                Panel(plane=plane, index=index, left=left, top=top, width=width, height=height)
            )
        top += height + GAP
    return panels


def slice_indices(labels: Array, axis: int) -> list[int]:
    """Return the slices to draw along an axis, evenly spaced over the extent of the labels."""
    others = tuple(other for other in range(3) if other != axis)
    (found,) = np.nonzero((labels != 0).any(axis=others))
    first, last = (found[0], found[-1]) if found.size else (0, labels.shape[axis] - 1)
    places = first + (last - first) * np.linspace(FIRST, LAST, COLUMNS)
    return [int(index) for index in np.rint(places)]


def _scan_panel(shown: ShownVolume, panel: Panel) -> Array:
    picture = Picture.fromarray(np.ascontiguousarray(_slice(shown.grey, panel)))
    size = (panel.width, panel.height)
    return np.asarray(picture.resize(size, Picture.Resampling.BILINEAR))


def _label_panel(shown: ShownVolume, panel: Panel) -> Array:
    labels = _slice(shown.labels, panel)
    # nearest neighbour, because a value between two labels would be another label
    rows, columns = (
        ((np.arange(pixels) + 0.5) * voxels / pixels).astype(int)
        for pixels, voxels in zip((panel.height, panel.width), labels.shape, strict=True)
    )
    drawn: Array = labels[rows[:, np.newaxis], columns]
    return drawn


def _slice(array: Array, panel: Panel) -> Array:
    """Return a slice as rows from top to bottom."""
    axis, right, _, letters = PLANES[panel.plane]
    # the lower of the other two axes comes first, which is the one to the right
    rows = np.moveaxis(array, axis, 0)[panel.index].T[::-1]  # the upward axis ends at the top
    drawn: Array = rows[:, ::-1] if letters[0] == POSITIVE[right] else rows
    return drawn


def _palette(table: Sequence[LabelColor]) -> tuple[Array, Array]:
    """Return (N + 1, 4) colours, the first transparent, and their N values, sorted."""
    drawn = sorted((label for label in table if label.value != 0), key=lambda label: label.value)
    colors = np.zeros((len(drawn) + 1, 4), dtype=np.uint8)
    for number, label in enumerate(drawn, 1):
        colors[number] = (*label.color, 255)
    return colors, np.array([label.value for label in drawn], dtype=np.int64)


def _outlined(labels: Array, values: Array) -> Array:
    """Return the row of the palette for each pixel: 0 but for the outermost pixels of a label."""
    if not values.size:
        return np.zeros(labels.shape, dtype=np.intp)
    numbers = np.searchsorted(values, labels).clip(max=values.size - 1)
    numbers = np.where(values[numbers] == labels, numbers + 1, 0)
    edge = np.zeros(labels.shape, dtype=bool)
    for axis in (0, 1):
        differs = np.diff(numbers, axis=axis) != 0
        before, after = [(0, 0), (0, 0)], [(0, 0), (0, 0)]
        before[axis], after[axis] = (0, 1), (1, 0)
        edge |= np.pad(differs, before) | np.pad(differs, after)
    return np.where(edge, numbers, 0)


def _with_letters(scan: Array, panels: Sequence[Panel], shown: ShownVolume) -> Array:
    """Return the scan with the directions of the subject, and the place of each slice in mm."""
    picture = Picture.fromarray(scan)
    draw = ImageDraw.Draw(picture)
    letter = ImageFont.load_default(LETTER_PIXELS)
    number = ImageFont.load_default(NUMBER_PIXELS)
    for panel in panels:
        left, top = panel.left + 2, panel.top + 1
        right, bottom = panel.left + panel.width - 2, panel.top + panel.height - 1
        x, y = panel.left + panel.width // 2, panel.top + panel.height // 2
        places = ((left, y, "lm"), (right, y, "rm"), (x, top, "ma"), (x, bottom, "md"))
        for text, (across, down, anchor) in zip(PLANES[panel.plane][3], places, strict=True):
            at = (across, down)
            draw.text(at, text, LETTER_GREY, letter, anchor, stroke_width=1, stroke_fill=0)
        place = _place(shown, panel)
        draw.text((left, bottom), place, NUMBER_GREY, number, "ld", stroke_width=1, stroke_fill=0)
    return np.asarray(picture)


def _place(shown: ShownVolume, panel: Panel) -> str:
    """Return where a slice lies, such as `L 12`: mm from the origin of the world space."""
    axis = PLANES[panel.plane][0]
    centre = (np.array(shown.grey.shape) - 1) / 2
    centre[axis] = panel.index
    mm = float(shown.affine[axis, :3] @ centre + shown.affine[axis, 3])
    return f"{(POSITIVE if mm >= 0 else NEGATIVE)[axis]} {abs(mm):.0f}"
