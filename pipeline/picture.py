"""Pictures: a volume with its labels in physical proportions, and the Dice of many cases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from matplotlib.figure import Figure

from pipeline.types import Array, LabelMap

PLANES = (("sagittal", 0), ("coronal", 1), ("axial", 2))
COLOURS = "tab10"


def overlay(image: Any, labels: LabelMap, names: Mapping[str, int], path: Path, *, title: str = "") -> None:
    """Writes a PNG of three orthogonal slices through the middle of what was found, labels over grey values.

    Sagittal slices show the front on the right; coronal and axial slices show the subject's left on the picture's right, as
    radiologists read them. One mm is as long along every axis.

    Args:
        image: a nibabel image, three-dimensional.
        labels: (X, Y, Z) output values on its grid.
        names: name → output value.
        path: the PNG.
        title: the picture's heading.
    """
    grey, found, spacing = _canonical(image, labels)
    where = np.argwhere(found > 0)
    centre = np.rint(where.mean(axis=0) if len(where) else np.array(found.shape) / 2).astype(int)
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    axes = figure.subplots(1, 3)
    low, high = np.percentile(grey, [1, 99.5])
    values = [value for value in names.values() if value != 0]
    for panel, (plane, axis) in zip(axes, PLANES, strict=True):
        across, up = (i for i in range(3) if i != axis)
        aspect = spacing[up] / spacing[across]
        panel.imshow(grey.take(centre[axis], axis=axis).T, cmap="gray", origin="lower", vmin=low, vmax=high, aspect=aspect)
        part = found.take(centre[axis], axis=axis).T
        index = np.ma.masked_equal(sum((part == value) * (i + 1) for i, value in enumerate(values)), 0)
        panel.imshow(index, cmap=COLOURS, origin="lower", alpha=0.45, vmin=1, vmax=10, aspect=aspect, interpolation="nearest")
        if axis != 0:
            panel.invert_xaxis()
        panel.set_title(f"{plane} {centre[axis]}", fontsize=9)
        panel.set_axis_off()
        left, right = ("P", "A") if axis == 0 else ("R", "L")
        panel.text(0.02, 0.5, left, transform=panel.transAxes, color="yellow", va="center")
        panel.text(0.98, 0.5, right, transform=panel.transAxes, color="yellow", va="center", ha="right")
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _canonical(image: Any, labels: LabelMap) -> tuple[Array, Array, Array]:
    """Grey values and labels turned to RAS, and the spacing there, mm."""
    upright = nib.as_closest_canonical(image)
    turned = nib.as_closest_canonical(nib.Nifti1Image(labels.astype(np.float32), image.affine))
    return np.asarray(upright.dataobj, dtype=np.float32), np.asarray(turned.dataobj), np.array(upright.header.get_zooms()[:3])


def dice_bars(rows: Sequence[Mapping[str, Any]], path: Path, *, title: str = "") -> None:
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
            (float(row["dice"]), str(row["case"])) for row in rows if row["label"] == label and row["dice"] == row["dice"]
        )
        values = np.array([value for value, _ in scored])
        panel.barh(range(len(scored)), values, color="tab:blue", height=0.8)
        panel.set_yticks(range(len(scored)), [case for _, case in scored], fontsize=5)
        if len(scored):
            panel.axvline(values.mean(), color="tab:red", label=f"mean {values.mean():.3f}")
            panel.axvline(float(np.median(values)), color="tab:green", ls="--", label=f"median {np.median(values):.3f}")
            panel.legend(loc="lower left", fontsize=7)
        panel.set(title=label, xlabel="Dice", xlim=(0, 1), ylim=(-0.6, len(scored) - 0.4))
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
