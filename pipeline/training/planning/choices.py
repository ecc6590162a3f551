"""From what data are like and what a machine can do to a spec and a run, each choice with its reason.

References:
    Isensee et al.: nnU-Net. Nature Methods 18, 203-211 (2021), doi:10.1038/s41592-020-01008-z: spacing, patch and poolings from
    the fingerprint of a dataset. Here the time there is decides as well.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, prod
from statistics import median
from typing import Any

import numpy as np
import yaml

from pipeline.training.planning.fingerprint import Fingerprint
from pipeline.training.planning.timing import TrainingTimes

ANISOTROPIC = 3.0  # an axis with voxels so many times longer than the others' is taken at its finer cases' spacing
SMALLEST = 4  # voxels along an axis at the bottleneck
ZEROS = 0.25  # fraction of voxels at 0 from which a volume counts as cut out (skull-stripped)
BASE = {"cpu": 16, "gpu": 32}  # features of the first level
MOST = {
    "cpu": 320_000,
    "gpu": 4_000_000,
}  # voxels a step: what trains often enough in an hour, what a GPU holds
WIDEST = 320  # features
FOLDS = 5
SUBJECT = re.compile(r"(sub-[A-Za-z0-9]+)")
SIDE = re.compile(r"[_-](?:left|right|lh|rh|l|r)$", re.IGNORECASE)
RESERVED = 0.08  # of the time, for reading the data before and leaving the bundle after


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """One setting, its value and why it was chosen."""

    name: str
    value: Any
    why: str


def choose_settings(
    prints: Sequence[Fingerprint],
    labels: dict[str, int],
    channels: Sequence[str],
    device: str,
    dims: int = 3,
) -> list[Choice]:
    """The settings of the spec and those of the run that data and device decide; the length of training comes after.

    Args:
        prints: of all usable cases.
        labels: name → value.
        channels: their names.
        device: what trains, `cpu` or `gpu`.
        dims: 2 for a network of slices, 3 for one of volumes.
    """
    spacing, why_spacing = _spacing(prints)
    shapes = np.array(
        [[n * s / mm for n, s, mm in zip(p.shape, p.spacing, spacing, strict=True)] for p in prints]
    )
    typical = np.median(shapes, axis=0)
    across = (
        int(np.argmax(spacing)) if max(spacing) > 1.5 * min(spacing) else int(np.argmin(typical))
    )
    axes = [axis for axis in range(3) if dims == 3 or axis != across]
    batch, cases = (32, 4) if dims == 2 else (4, 4)
    voxels = MOST[device] // batch if dims == 3 else MOST[device]
    roi, strides = _window([float(typical[a]) for a in axes], [spacing[a] for a in axes], voxels)
    while dims == 3 and batch > 2 and prod(roi) * batch > MOST[device]:
        batch //= 2
    features = [min(WIDEST, BASE[device] * 2**level) for level in range(len(strides) + 1)]
    norm = "batch" if batch > 2 else "instance"
    zeros = median(p.zeros for p in prints)
    choices = [
        Choice(name="spec.labels", value=labels, why="as the dataset has them"),
        Choice(name="spec.channels", value=list(channels), why="one file each"),
        Choice(name="spec.spacing", value=spacing, why=why_spacing),
        Choice(name="spec.intensity", value={"method": "zscore", "nonzero": zeros > ZEROS},
               why=f"MRI has no scale of its own; {zeros:.0%} of a volume's voxels are 0"
               + (", so only the others count" if zeros > ZEROS else "")),
        Choice(name="spec.roi_size", value=roi, why=f"the median volume has {_text(typical)} voxels at that spacing"
               + ("" if all(r >= typical[a] for r, a in zip(roi, axes, strict=True))
                  else f"; a step may have {MOST[device]:,} on this {device}")),
        Choice(name="spec.network", value={"features": features, "strides": strides, "norm": norm},
               why=f"poolings down to {SMALLEST} voxels or more, and none along an axis twice as coarse as the finest"),
        Choice(name="run.batch_size", value=batch, why="patches a step" if dims == 3 else "slices a step"),
        Choice(name="run.learning_rate", value=0.002 if batch > 2 else 0.001, why=f"for AdamW with {batch} patches a step"),
        Choice(name="run.augment", value={"mirror": []}, why="where no label has a side, mirror images ([R]) double the data"),
    ]  # fmt: skip
    if dims == 2:
        choices.append(
            Choice(
                name="spec.slice_axis",
                value="RAS"[across],
                why="the axis with the longest voxels, or the fewest",
            )
        )
        choices.append(
            Choice(
                name="run.patches_per_case",
                value=batch // cases,
                why="slices are taken from several cases a step",
            )
        )
    return choices


def _spacing(prints: Sequence[Fingerprint]) -> tuple[list[float], str]:
    """Mm along right, anterior, superior: medians, but finer along an axis whose voxels are long."""
    each = np.array([p.spacing for p in prints])
    middle = np.median(each, axis=0)
    axis = int(np.argmax(middle))
    if middle[axis] > ANISOTROPIC * np.delete(middle, axis).max():
        fine = max(float(np.percentile(each[:, axis], 10)), float(np.delete(middle, axis).max()))
        middle[axis] = fine
        return [
            round(float(mm), 3) for mm in middle
        ], "the cases' median; their tenth percentile along the axis of thick slices"
    same = np.allclose(each, middle, rtol=0.01)
    return [
        round(float(mm), 3) for mm in middle
    ], "that of all cases" if same else "the cases' median"


def _window(
    typical: Sequence[float], spacing: Sequence[float], voxels: int
) -> tuple[list[int], list[list[int]]]:
    """The largest window of so many voxels in the proportions of the typical volume, and its poolings."""
    scale = min(1.0, (voxels / prod(typical)) ** (1 / len(typical)))
    wanted = [n * scale for n in typical]
    sizes, mm = list(wanted), list(spacing)
    strides: list[list[int]] = []
    while len(strides) < 5:
        pool = [size / 2 >= SMALLEST and s < 2 * min(mm) for size, s in zip(sizes, mm, strict=True)]
        if not any(pool):
            break
        strides.append([2 if p else 1 for p in pool])
        sizes = [size / 2 if p else size for size, p in zip(sizes, pool, strict=True)]
        mm = [s * 2 if p else s for s, p in zip(mm, pool, strict=True)]
    steps = [prod(stride[axis] for stride in strides) for axis in range(len(typical))]
    fits = scale == 1.0
    roi = [
        step * max(1, ceil(n / step - 0.2) if fits else round(n / step))
        for n, step in zip(wanted, steps, strict=True)
    ]
    return roi, strides


def make_folds(
    cases: Sequence[str], count: int = FOLDS, seed: int = 0
) -> list[dict[str, list[str]]]:
    """Folds of about equal size, always the same; scans of one subject, as their names tell, stay together.

    A name's subject is its BIDS `sub-…`, else the name without a side (`_left`, `_R`) at its end.
    """
    groups: dict[str, list[str]] = {}
    for name in sorted(cases):
        match = SUBJECT.search(name)
        groups.setdefault(match[1] if match else SIDE.sub("", name), []).append(name)
    order = np.random.default_rng(seed).permutation(len(groups))
    members = list(groups.values())
    parts: list[list[str]] = [[] for _ in range(min(count, len(groups)))]
    for place in order:
        min(parts, key=len).extend(members[place])
    return [
        {"train": sorted(n for part in parts if part is not val for n in part), "val": sorted(val)}
        for val in parts
    ]


def training_length(minutes: float, steps_per_epoch: int, pace: TrainingTimes) -> tuple[int, float]:
    """How many epochs fit, and the seconds that they and what goes around them take.

    Args:
        minutes: in all.
        steps_per_epoch: of training.
        pace: measured here.
    """
    epoch = steps_per_epoch * pace.step
    room = 60 * minutes * (1 - RESERVED) - pace.around - pace.validation
    epochs = max(1, int(room / epoch))
    return epochs, epochs * epoch + pace.around + pace.validation


def nested_values(choices: Sequence[Choice], prefix: str) -> dict[str, Any]:
    """The values of the choices whose name begins so, by the rest of their name."""
    return {c.name.removeprefix(prefix): c.value for c in choices if c.name.startswith(prefix)}


def commented_yaml(content: dict[str, Any], why: dict[str, str], head: str) -> str:
    """YAML with each top-level key's reason behind it."""
    lines = [f"# {head}"]
    for key, value in content.items():
        text = yaml.safe_dump(
            value, sort_keys=False, default_flow_style=True, width=110, allow_unicode=True
        )
        first, *rest = text.removesuffix("...\n").splitlines()
        lines += [f"# {why[key]}"] if key in why else []
        lines += [f"{key}: {first}", *("  " + line.strip() for line in rest)]
    return "\n".join(lines) + "\n"


def _text(sizes: Any) -> str:
    return "×".join(f"{n:.0f}" for n in sizes)
