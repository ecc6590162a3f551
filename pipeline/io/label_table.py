"""Names, values and colours of labels, for figures, viewers and label files.

FreeSurfer's structures have the colours that FreeSurfer, Freeview and 3D Slicer show them in. All
other labels get colours that differ from each other.

References:
    FreeSurfer: FreeSurferColorLUT.txt,
    https://surfer.nmr.mgh.harvard.edu/fswiki/FsTutorial/AnatomicalROI/FreeSurferColorLUT
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from colorsys import hls_to_rgb
from dataclasses import dataclass
from functools import cache
from importlib.resources import as_file, files
from itertools import count, product

import numpy as np

from pipeline.io.tables import read_csv
from pipeline.types import Array

Rgb = tuple[int, int, int]

BACKGROUND_COLOR: Rgb = (0, 0, 0)
# Tableau 10, without its grey, which is hard to tell from the voxels of the image underneath
PALETTE: tuple[Rgb, ...] = (
    (31, 119, 180),
    (255, 127, 14),
    (44, 160, 44),
    (214, 39, 40),
    (148, 103, 189),
    (140, 86, 75),
    (227, 119, 194),
    (188, 189, 34),
    (23, 190, 207),
)
# further colours are chosen from these: hues around the circle, at each lightness and saturation
HUES = 36
LIGHTNESS = (0.3, 0.42, 0.55, 0.68, 0.8)
SATURATION = (0.45, 0.7, 1.0)
# CIELAB distance below which two colours are hard to tell apart in thin outlines
CLOSE = 12.0
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
    """

    name: str
    value: int
    color: Rgb


def label_table(labels: Mapping[str, int]) -> list[LabelColor]:
    """Return the labels with their colours, in the order of `labels`.

    A label gets FreeSurfer's colour if both its name and its value are FreeSurfer's (left and right
    sides share one). Every other label gets a colour that no other label has. The background, value
    0, is black. The colours depend on nothing but the labels.

    Args:
        labels: name → value, as in a spec.
    """
    standard = {name: _standard_color(name, value) for name, value in labels.items()}
    other_colors = _distinct_colors([color for color in standard.values() if color is not None])
    return [
        LabelColor(name=name, value=value, color=standard[name] or next(other_colors))
        for name, value in labels.items()
    ]


def _standard_color(name: str, value: int) -> Rgb | None:
    """Return the colour of the background or of a structure of FreeSurfer; None for others."""
    if value == 0:
        return BACKGROUND_COLOR
    known = _freesurfer_labels().get(value)
    if known is None or _normalised(known.name) != _normalised(name):
        return None
    return known.color


@cache
def _freesurfer_labels() -> dict[int, LabelColor]:
    """Return value → structure, of the segmentation aseg.mgz of FreeSurfer."""
    with as_file(files("pipeline.io") / "freesurfer_labels.csv") as path:
        rows = read_csv(path)
    labels = {}
    for row in rows:
        color = (int(row["red"]), int(row["green"]), int(row["blue"]))
        value = int(row["value"])
        labels[value] = LabelColor(name=row["name"], value=value, color=color)
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
    """Return (len(first), len(second)) distances in CIELAB, which are about those of the eye."""
    difference = _lab(first)[:, np.newaxis] - _lab(second)
    distances: Array = np.linalg.norm(difference, axis=-1)
    return distances


def _lab(colors: Sequence[Rgb]) -> Array:
    """Return (N, 3) CIELAB coordinates of sRGB colours, for the white of D65."""
    rgb = np.array(colors) / 255
    linear = np.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    xyz = linear @ XYZ_FROM_RGB.T / XYZ_FROM_RGB.sum(axis=1)
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116).T
    lab: Array = np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=1)
    return lab
