"""Names, values and colours of labels, for figures, viewers and label files.

FreeSurfer's structures have the colours that FreeSurfer, Freeview and 3D Slicer show them in. All
other labels get colours that differ from each other, for people with colour blindness too.

References:
    FreeSurfer: FreeSurferColorLUT.txt,
    https://surfer.nmr.mgh.harvard.edu/fswiki/FsTutorial/AnatomicalROI/FreeSurferColorLUT
    Okabe and Ito, Color universal design, 2008, https://jfly.uni-koeln.de/color/
    Machado, Oliveira and Fernandes, A physiologically-based model for simulation of color vision
    deficiency, IEEE TVCG 15(6), 2009, doi:10.1109/TVCG.2009.113
    BIDS: Common image-derived labels, in "Imaging data types" of BIDS Derivatives
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from colorsys import hls_to_rgb
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import as_file, files
from itertools import count, product

import numpy as np

from pipeline.io.tables import read_csv
from pipeline.types import Array

Rgb = tuple[int, int, int]
Rgba = tuple[int, int, int, int]

BACKGROUND_COLOR: Rgb = (0, 0, 0)
# the palette of Okabe and Ito, without its black, which is the background; the order keeps the
# first few far apart
PALETTE: tuple[Rgb, ...] = (
    (0, 114, 178),
    (230, 159, 0),
    (0, 158, 115),
    (213, 94, 0),
    (86, 180, 233),
    (204, 121, 167),
    (240, 228, 66),
)
# further colours are chosen from these: hues around the circle, at each lightness and saturation
HUES = 36
LIGHTNESS = (0.3, 0.42, 0.55, 0.68, 0.8)
SATURATION = (0.45, 0.7, 1.0)
# CIELAB distance below which two colours are hard to tell apart in thin outlines
CLOSE = 12.0
# linear RGB → linear RGB as people see it without red, green and blue cones (Machado et al., all
# of severity 1), after normal vision
VISIONS = np.array(
    [
        [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ],
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ],
        [
            [1.255528, -0.076749, -0.178779],
            [-0.078411, 0.930809, 0.147602],
            [0.004733, 0.691367, 0.303900],
        ],
    ]
)
# how much a distance counts as each of them: most people have normal vision, and tritanopia is rare
VISION_WEIGHTS = np.array([1.0, 2.0, 2.0, 3.0])
# a label map with so many values, all of which are FreeSurfer's, is numbered as FreeSurfer's are
FREESURFER_VALUES = 8
# steps of the golden ratio around the circle of hues never come back to the same place
HUE_STEP = 0.618034
# sRGB → CIE XYZ at the white of D65
XYZ_FROM_RGB = np.array(
    [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
)

# words that FreeSurfer's names abbreviate; "proper" was dropped from the thalamus in version 7
FULL_WORDS = {
    "inf": "inferior",
    "lat": "lateral",
    "vent": "ventricle",
    "csf": "cerebrospinalfluid",
    "proper": "",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelColor:
    """One label with its colour.

    Attributes:
        name: name of the label, as in the spec.
        value: value of the label in the label map.
        color: red, green and blue, 0 to 255.
        abbreviation: short name, such as L-Hip; empty for labels that are not FreeSurfer's.
        freesurfer_name: name in FreeSurfer's table, such as Left-Hippocampus; empty for others.
        bids_value: value of the tissue among BIDS's common image-derived labels, such as 9 for
            subcortical grey matter; None if BIDS has none.
    """

    name: str
    value: int
    color: Rgb
    abbreviation: str = ""
    freesurfer_name: str = ""
    bids_value: int | None = None

    @property
    def rgba(self) -> Rgba:
        """Red, green, blue and opacity, 0 to 255; only the background is transparent."""
        return (*self.color, 255 if self.value else 0)

    @property
    def hex_color(self) -> str:
        """The colour as #RRGGBB."""
        return "#" + bytes(self.color).hex().upper()


def label_table(labels: Mapping[str, int]) -> list[LabelColor]:
    """Return the labels with their colours, in the order of `labels`.

    It is the one table of names and colours: figures, reports and all files of labels use it. A
    label gets FreeSurfer's colour if both its name and its value are FreeSurfer's (left and right
    sides share one). Every other label gets a colour that no other label has. The background, value
    0, is black. The colours depend on nothing but the labels.

    Args:
        labels: name → value, as in `Spec.labels`.
    """
    standard = {name: _standard_label(name, value) for name, value in labels.items()}
    other_colors = _distinct_colors([row.color for row in standard.values() if row is not None])
    table = []
    for name, value in labels.items():
        known = standard[name]
        if known is None:
            table.append(LabelColor(name=name, value=value, color=next(other_colors)))
        else:
            table.append(replace(known, name=name))
    return table


def labels_of_values(values: Iterable[int]) -> dict[str, int]:
    """Return name → value for a label map of which only the values are known.

    They get FreeSurfer's names where all of them are FreeSurfer's and at least `FREESURFER_VALUES`,
    because a map of a few structures numbers them in its own way; all others are `label N`.
    """
    known = _freesurfer_labels()
    ordered = sorted({int(value) for value in values} - {0})
    if len(ordered) < FREESURFER_VALUES or not known.keys() >= set(ordered):
        return {f"label {value}": value for value in ordered}
    return {known[value].name: value for value in ordered}


def _standard_label(name: str, value: int) -> LabelColor | None:
    """Return the background or a structure of FreeSurfer; None for other labels."""
    known = _freesurfer_labels().get(value)
    if known is None or (value != 0 and _normalised(known.name) != _normalised(name)):
        return None
    return known


@cache
def _freesurfer_labels() -> dict[int, LabelColor]:
    """Return value → structure, of the segmentation aseg.mgz of FreeSurfer."""
    with as_file(files("pipeline.io") / "freesurfer_labels.csv") as path:
        rows = read_csv(path)
    labels = {}
    for row in rows:
        value = int(row["value"])
        labels[value] = LabelColor(
            name=row["name"],
            value=value,
            color=(int(row["red"]), int(row["green"]), int(row["blue"])),
            abbreviation=row["abbreviation"],
            freesurfer_name=row["name"],
            bids_value=int(row["bids"]) if row["bids"] else None,
        )
    return labels


def _normalised(name: str) -> str:
    """Return a name for comparison: lower case, full words, letters and digits only.

    >>> _normalised("Left-Inf-Lat-Vent") == _normalised("left inferior lateral ventricle")
    True
    """
    words = re.split(r"[^a-z0-9]+", name.lower())
    return "".join(FULL_WORDS.get(word, word) for word in words)


def _distinct_colors(taken: Collection[Rgb]) -> Iterator[Rgb]:
    """Yield colours without end, none twice and none of `taken`.

    First come those of the palette, then, one by one, the candidate that is farthest from all
    colours so far.
    """
    used = [BACKGROUND_COLOR, *dict.fromkeys(taken)]
    for color in PALETTE:
        if _distances([color], used).min() >= CLOSE:
            used.append(color)
            yield color
    candidates = _candidate_colors()
    nearest = _distances(candidates, used).min(axis=1)
    while nearest.max() > 0:
        color = candidates[int(nearest.argmax())]
        nearest = np.minimum(nearest, _distances(candidates, [color])[:, 0])
        used.append(color)
        yield color
    for number in count():  # thousands of labels, which no eye can tell apart
        color = _rgb((number * HUE_STEP) % 1.0, 0.5, 0.75 + 0.2 * (number % 7) / 7)
        if color not in used:
            used.append(color)
            yield color


def _candidate_colors() -> list[Rgb]:
    return [
        _rgb(number / HUES, lightness, saturation)
        for number, lightness, saturation in product(range(HUES), LIGHTNESS, SATURATION)
    ]


def _rgb(hue: float, lightness: float, saturation: float) -> Rgb:
    red, green, blue = hls_to_rgb(hue, lightness, saturation)
    return round(255 * red), round(255 * green), round(255 * blue)


def _distances(first: Sequence[Rgb], second: Sequence[Rgb]) -> Array:
    """Return (len(first), len(second)) distances of colours as the eye sees them.

    They are distances in CIELAB, the smallest one of all kinds of vision.
    """
    difference = _lab(first)[:, :, np.newaxis] - _lab(second)[:, np.newaxis]
    distances = np.linalg.norm(difference, axis=-1) * VISION_WEIGHTS[:, np.newaxis, np.newaxis]
    nearest: Array = distances.min(axis=0)
    return nearest


def _lab(colors: Sequence[Rgb]) -> Array:
    """Return (V, N, 3) CIELAB coordinates of sRGB colours in each vision, for the white of D65."""
    rgb = np.array(colors) / 255
    linear = np.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    seen = np.clip(linear @ VISIONS.transpose(0, 2, 1), 0, 1)
    xyz = seen @ XYZ_FROM_RGB.T / XYZ_FROM_RGB.sum(axis=1)
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    x, y, z = f[..., 0], f[..., 1], f[..., 2]
    lab: Array = np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)
    return lab
