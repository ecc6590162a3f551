"""From the frames of a DICOM series to volumes on one grid.

Slices are sorted by their place, never by their number. What does not form whole volumes of equal
distances is refused, with the reason.

References:
    DICOM PS3.3, C.7.6.2.1.1: place and orientation of pixels, in LPS
    Li, Morgan, Ashburner et al., The first step for neuroimaging data analysis: DICOM to NIfTI
    conversion, Journal of Neuroscience Methods 264, 2016, doi:10.1016/j.jneumeth.2016.03.001
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.errors import VolumeError
from pipeline.io.dicom_frames import Frame
from pipeline.io.itk import RAS_FROM_LPS
from pipeline.types import Affine, Array

SAME_DIRECTION = 1e-3  # cosines of frames of one volume differ by rounding only
SAME_PLACE_MM = 0.01
MAX_SHEAR = 0.01  # cosine; as for all other files (`check_affine`)
GAP = 1.5  # times the median distance: a slice is missing
# fractions of the distance that a slice may be off its place: below the first is rounding, between
# them a warning
ROUNDING, MAX_UNEVEN = 0.01, 0.1

SamePixels = Callable[[Frame, Frame], bool]


@dataclass(frozen=True, kw_only=True, slots=True)
class Arrangement:
    """Frames of a series in their order.

    The array of a volume has the axes column number, row number from the last row, slice: as
    dcm2niix stores them.

    Attributes:
        volumes: the frames of each volume, from the first slice to the last.
        affine: voxel index → RAS+ world, mm.
        shape: (columns, rows, slices).
        differ_in: names of the attributes that tell the volumes apart.
        warnings: what is doubtful, one sentence each.
    """

    volumes: tuple[tuple[Frame, ...], ...]
    affine: Affine
    shape: tuple[int, int, int]
    differ_in: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def arrange(
    frames: Sequence[Frame], shape: tuple[int, int], name: str, same_pixels: SamePixels
) -> Arrangement:
    """Return the volumes that frames form.

    Args:
        frames: of a series, in any order.
        shape: rows and columns of each.
        name: of the series, for messages.
        same_pixels: whether two frames have the same stored values.

    Raises:
        VolumeError: they do not form volumes on one grid.
    """
    try:
        return _arrange(frames, shape, same_pixels)
    except VolumeError as error:
        raise VolumeError(f"{name}: {error}") from None


def _arrange(
    frames: Sequence[Frame], shape: tuple[int, int], same_pixels: SamePixels
) -> Arrangement:
    _check_one_orientation(frames)
    places = _places(frames)
    places, differ_in, warnings = _volumes_of(places, same_pixels)
    firsts = [place[0] for place in places]
    step, more = _step(firsts)
    affine = _affine(firsts[0], step, shape)
    volumes = tuple(zip(*places, strict=True))
    return Arrangement(
        volumes=volumes,
        affine=affine,
        shape=(shape[1], shape[0], len(firsts)),
        differ_in=differ_in,
        warnings=(*warnings, *more),
    )


def normal(frame: Frame) -> Array:
    """Return the direction across a slice, a unit vector, LPS."""
    across: Array = np.cross(frame.row, frame.column)
    across /= np.linalg.norm(across)
    return across


def _check_one_orientation(frames: Sequence[Frame]) -> None:
    kinds: Counter[tuple[float, ...]] = Counter()
    for frame in frames:
        directions = np.array([*frame.row, *frame.column])
        known = (kind for kind in kinds if np.abs(directions - kind).max() <= SAME_DIRECTION)
        kinds[next(known, tuple(directions))] += 1
    if len(kinds) > 1:
        counts = ", ".join(str(count) for count in kinds.values())
        raise VolumeError(
            f"its slices have {len(kinds)} orientations ({counts} slices), as those of a localiser "
            "have; expected one: put each orientation into a series of its own"
        )
    spacings = np.array([frame.spacing for frame in frames])
    if (np.ptp(spacings, axis=0) > ROUNDING * spacings.min()).any():
        raise VolumeError("its slices have pixels of different sizes, expected one size")


def _places(frames: Sequence[Frame]) -> list[list[Frame]]:
    """Return the frames at each place along the normal, sorted."""
    across = normal(frames[0])
    depth = np.array([frame.position for frame in frames]) @ across
    places: list[list[Frame]] = []
    last = -np.inf
    for index in np.argsort(depth, kind="stable"):
        if depth[index] - last > SAME_PLACE_MM:
            places.append([])
            last = depth[index]
        places[-1].append(frames[index])
    for place in places:
        positions = np.array([frame.position for frame in place])
        if np.ptp(positions, axis=0).max() > max(place[0].spacing):
            raise VolumeError(
                "it holds several stacks of slices side by side; put each into a series of its own"
            )
    return places


def _volumes_of(
    places: list[list[Frame]], same_pixels: SamePixels
) -> tuple[list[list[Frame]], tuple[str, ...], list[str]]:
    """Return the frames at each place, one for each volume, and what the volumes differ in."""
    if max(map(len, places)) == 1:
        return places, (), []
    sizes = sorted({len(place) for place in places})
    differ_in = _separating_names(places) if len(sizes) == 1 else ()
    if differ_in:
        return [_sorted_by(place, differ_in) for place in places], differ_in, []
    kept = [_without_copies(place, same_pixels) for place in places]
    if max(map(len, kept)) == 1:
        dropped = sum(map(len, places)) - len(kept)
        return kept, (), [f"{dropped} slices were there twice, with the same pixels"]
    if len(sizes) > 1:
        raise VolumeError(
            f"its slices are there {sizes[0]} to {sizes[-1]} times, with different pixels: slices "
            "of a volume are missing, or others were added"
        )
    raise VolumeError(
        f"each slice is there {sizes[0]} times with different pixels, and nothing in the headers "
        "that volseg looks at tells the volumes apart; put each volume into a series of its own"
    )


def _separating_names(places: list[list[Frame]]) -> tuple[str, ...]:
    """Return the fewest attributes that tell the frames of each place apart; none if none do."""
    names: list[str] = []
    for name in places[0][0].separating:
        found = [Counter(frame.separating.get(name) for frame in place) for place in places]
        if len(found[0]) > 1 and all(counts == found[0] for counts in found):
            names.append(name)
            if all(_are_apart(place, names) for place in places):
                return tuple(names)
    return ()


def _are_apart(place: Sequence[Frame], names: Sequence[str]) -> bool:
    return len({_values(frame, names) for frame in place}) == len(place)


def _values(frame: Frame, names: Sequence[str]) -> tuple[Hashable, ...]:
    return tuple(frame.separating.get(name) for name in names)


def _sorted_by(place: list[Frame], names: Sequence[str]) -> list[Frame]:
    def key(frame: Frame) -> tuple[tuple[str, float, str], ...]:
        values = _values(frame, names)
        return tuple(
            ("", value, "") if isinstance(value, float) else (str(type(value)), 0.0, str(value))
            for value in values
        )

    return sorted(place, key=key)


def _without_copies(place: list[Frame], same_pixels: SamePixels) -> list[Frame]:
    kept = [place[0]]
    for frame in place[1:]:
        if not any(_same_values(frame, other, same_pixels) for other in kept):
            kept.append(frame)
    return kept


def _same_values(first: Frame, second: Frame, same_pixels: SamePixels) -> bool:
    scaling = (first.slope, first.intercept) == (second.slope, second.intercept)
    return scaling and same_pixels(first, second)


def _step(slices: Sequence[Frame]) -> tuple[Array, list[str]]:
    """Return the vector from one slice to the next, LPS, mm, and warnings."""
    across = normal(slices[0])
    if len(slices) == 1:
        return _single_slice(slices[0], across)
    positions = np.array([frame.position for frame in slices])
    depth = positions @ across
    distances = np.diff(depth)
    usual = float(np.median(distances))
    if distances.max() > GAP * usual:
        missing = int(np.rint(distances / usual - 1)[distances > GAP * usual].sum())
        raise VolumeError(
            f"about {missing} slices are missing: the distance of neighbouring slices is "
            f"{usual:.4g} mm, in {int((distances > GAP * usual).sum())} places up to "
            f"{distances.max():.4g} mm; fetch the series again"
        )
    step = (positions[-1] - positions[0]) / (len(slices) - 1)
    shear = np.linalg.norm(step - (step @ across) * across) / np.linalg.norm(step)
    if shear > MAX_SHEAR:
        raise VolumeError(
            f"its slices are shifted against each other ({np.degrees(np.arcsin(shear)):.1f}°), as "
            "those of a tilted gantry are: resample the series to a straight grid first"
        )
    return step, _uneven(positions, step)


def _uneven(positions: Array, step: Array) -> list[str]:
    """Return a warning where slices are off the places of a grid.

    Raises:
        VolumeError: they are too far off.
    """
    expected = positions[0] + np.arange(len(positions))[:, np.newaxis] * step
    length = float(np.linalg.norm(step))
    off = float(np.linalg.norm(positions - expected, axis=1).max())
    if off > MAX_UNEVEN * length:
        raise VolumeError(
            f"its slices have unequal distances: one lies {off:.3g} mm off its place, at a "
            f"distance of {length:.4g} mm; expected equal ones: resample the series first"
        )
    if off > max(ROUNDING * length, SAME_PLACE_MM):
        return [
            f"the slices have unequal distances: up to {off:.3g} mm off, at a distance of "
            f"{length:.4g} mm; equal ones were assumed"
        ]
    return []


def _single_slice(frame: Frame, across: Array) -> tuple[Array, list[str]]:
    if not frame.thickness > 0:
        raise VolumeError("it has one slice of unknown thickness, expected a volume")
    return across * frame.thickness, [
        "the series has one slice, expected a volume: was one file of many given?"
    ]


def _affine(first: Frame, step: Array, shape: tuple[int, int]) -> Affine:
    """Return the affine of an array whose second axis runs from the last row to the first."""
    down = np.array(first.column) * first.spacing[0]
    affine = np.eye(4)
    affine[:3, 0] = np.array(first.row) * first.spacing[1]
    affine[:3, 1] = -down
    affine[:3, 2] = step
    affine[:3, 3] = np.array(first.position) + down * (shape[0] - 1)
    ras: Affine = RAS_FROM_LPS @ affine
    return ras
