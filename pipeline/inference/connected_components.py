"""Postprocessing of a label map: largest connected components, holes, the cropped region."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from monai.data import MetaTensor
from scipy import ndimage

from pipeline.config import ALL, EACH, Spec
from pipeline.inference.boxes import widen_box
from pipeline.types import Affine, Array

# voxels; a position that is less than this beyond a grid's edge counts as inside, because affines
# in files are rounded
OUTSIDE_TOLERANCE = 0.01
MM3_PER_ML = 1000.0


def keep_components(index: torch.Tensor, image: MetaTensor, spec: Spec) -> torch.Tensor:
    """Return class numbers (1, X, Y, Z) with the postprocessing that the spec asks for.

    Voxels outside the region that `spec.crop_resize` cropped the image to become background; then
    comes `clean_components`.

    Args:
        index: (1, X, Y, Z) class numbers on the grid of the label map.
        image: (C, x, y, z) image on the network's grid; its `meta` has the `labels_affine`.
        spec: gives `crop_resize` and the rules for connected components.
    """
    labels = index[0]
    # an image that no reader made has no affine of the labels; a rule in mL then counts in mm
    labels_affine = np.asarray(image.meta.get("labels_affine", np.eye(4)), dtype=np.float64)
    if spec.crop_resize is not None:
        own_affine = np.asarray(image.affine, dtype=np.float64)
        outside = outside_grid(image.shape[1:], own_affine, labels_affine, labels.shape)
        labels = labels.masked_fill(outside.to(labels.device), 0)
    return clean_components(labels, labels_affine, spec)[None]


def clean_components(index: torch.Tensor, affine: Affine, spec: Spec) -> torch.Tensor:
    """Return class numbers (X, Y, Z) whose connected components follow the rules of the spec.

    In this order: of all structures together only the largest component is kept, and holes inside
    it are filled (`largest_component: [all]`); components below `min_component_ml` are removed; of
    each structure in `largest_component` only the largest component is kept; what a structure in
    `fill_holes` encloses becomes part of it.

    Args:
        index: (X, Y, Z) class numbers.
        affine: affine of the label map, voxel → world, mm.
        spec: gives the labels and the rules.
    """
    rules = component_rules(spec, abs(float(np.linalg.det(affine[:3, :3]))))
    boxes = ndimage.find_objects((index != 0).cpu().numpy().view(np.uint8))
    if not boxes or (rules.is_empty() and ALL not in spec.largest_component):
        return index
    # all that changes, and one voxel around it, which is the nearest one of voxels at the edge
    box = widen_box(boxes[0], index.shape)
    cleaned = index.clone()
    cleaned[box] = _clean(index[box], rules, spec)
    return cleaned


def _clean(index: torch.Tensor, rules: ComponentRules, spec: Spec) -> torch.Tensor:
    """Return class numbers (X, Y, Z) that follow the rules; see `clean_components`."""
    labels = index
    if ALL in spec.largest_component:
        largest = largest_components((labels > 0).to(torch.uint8))
        labels = fill_holes(labels * largest.to(labels.dtype))
    if rules.is_empty():
        return labels
    members = region_members(spec) if spec.output == "regions" else None
    changed = labels.cpu().numpy().copy()
    if members is None:
        _remove_components(changed, rules)
        _fill_structures(changed, rules.filled)
    else:
        _clean_regions(changed, rules, members)
    return torch.from_numpy(changed).to(index.device)


@dataclass(frozen=True, kw_only=True, slots=True)
class ComponentRules:
    """The rules for connected components of single structures, by their class numbers.

    Attributes:
        smallest: class number → smallest component that is kept, voxels.
        largest: numbers of the classes of which only the largest component is kept.
        filled: numbers of the classes whose holes are filled.
    """

    smallest: Mapping[int, float]
    largest: frozenset[int]
    filled: frozenset[int]

    def is_empty(self) -> bool:
        """Return whether no structure has a rule."""
        return not (self.smallest or self.largest or self.filled)

    def removed(self, number: int, mask: Array) -> Array | None:
        """Return the voxels of a structure's mask that its rules remove; None for none of them."""
        smallest, only_largest = self.smallest.get(number, 0.0), number in self.largest
        if not (smallest or only_largest):
            return None
        components, count = ndimage.label(mask)
        if count == 1 and not smallest:
            return None
        sizes = np.bincount(components.ravel(), minlength=count + 1)
        is_removed = sizes < smallest
        if only_largest and count > 1:
            is_removed |= np.arange(count + 1) != 1 + sizes[1:].argmax()
        is_removed[0] = False  # component 0 is everything else
        if not is_removed.any():
            return None
        removed: Array = is_removed[components]
        return removed


def component_rules(spec: Spec, voxel_mm3: float) -> ComponentRules:
    """Return the rules of a spec by class numbers.

    Args:
        spec: gives `largest_component`, `min_component_ml` and `fill_holes`.
        voxel_mm3: volume of a voxel of the label map, mm³.
    """
    number_of = {name: number for number, name in enumerate(spec.labels)}
    structures = list(spec.labels)[1:]

    def numbers(names: Sequence[str]) -> frozenset[int]:
        listed = structures if EACH in names else [name for name in names if name != ALL]
        return frozenset(number_of[name] for name in listed)

    smallest = {}
    for name, volume_ml in spec.min_component_ml.items():
        smallest[number_of[name]] = volume_ml * MM3_PER_ML / voxel_mm3
    return ComponentRules(
        smallest=smallest,
        largest=numbers(spec.largest_component),
        filled=numbers(spec.fill_holes),
    )


def largest_components(index: torch.Tensor, numbers: Sequence[int] | None = None) -> torch.Tensor:
    """Return class numbers (X, Y, Z) in which each class is a single connected component.

    Voxels that share a face are connected. Of each class the largest component is kept. The voxels
    of smaller ones get the class of the nearest voxel outside them: background if they are
    isolated, but the surrounding structure if they lie inside one, so that they leave no hole.

    Args:
        index: (X, Y, Z) class numbers.
        numbers: numbers of the classes that are changed; None for all but the background.
    """
    labels = index.cpu().numpy().copy()
    chosen = range(1, int(labels.max(initial=0)) + 1) if numbers is None else numbers
    rules = ComponentRules(smallest={}, largest=frozenset(chosen), filled=frozenset())
    _remove_components(labels, rules)
    return torch.from_numpy(labels).to(index.device)


def _remove_components(labels: Array, rules: ComponentRules) -> None:
    """Give components that the rules remove the label of the nearest voxel outside, in place."""
    removed = np.zeros(labels.shape, dtype=np.uint8)
    for number, box in enumerate(ndimage.find_objects(labels), start=1):
        if box is not None:
            found = rules.removed(number, labels[box] == number)
            if found is not None:
                removed[box] |= found
    _take_nearest_label(labels, removed)


def _fill_structures(labels: Array, numbers: Collection[int]) -> None:
    """Give background that a structure encloses the number of the structure, in place."""
    for number, box in enumerate(ndimage.find_objects(labels), start=1):
        if box is not None and number in numbers:
            enclosed = ndimage.binary_fill_holes(labels[box] == number)
            labels[box][enclosed & (labels[box] == 0)] = number


def region_members(spec: Spec) -> list[list[int]]:
    """Return, for each class number, the class numbers that belong to its region; [] for 0.

    A voxel of a label map belongs to a region if its value is one of the region's.
    """
    members: list[list[int]] = []
    for name in spec.labels:
        values = spec.regions.get(name, ())
        belong = [number for number, value in enumerate(spec.labels.values()) if value in values]
        members.append(belong)
    return members


def _clean_regions(labels: Array, rules: ComponentRules, members: Sequence[Sequence[int]]) -> None:
    """Apply the rules to regions, in place.

    A component that is removed from a region becomes the region that was painted before it and
    that the voxel belongs to as well, background without one. A hole of a region is what it
    encloses and what was painted before it.

    Args:
        labels: (X, Y, Z) class numbers, changed in place.
        rules: rules for the regions.
        members: numbers that belong to each region, from `region_members`.
    """
    for number in range(1, len(members)):
        mask = np.isin(labels, members[number])
        found = rules.removed(number, mask)
        if found is not None:
            labels[found] = _numbers_below(number, members)[labels[found]]
            mask &= ~found
        if number in rules.filled:
            labels[ndimage.binary_fill_holes(mask) & ~mask & (labels < number)] = number


def _numbers_below(region: int, members: Sequence[Sequence[int]]) -> Array:
    """Return, for each class number, the one it becomes when a region does not hold the voxel."""
    below = np.zeros(len(members), dtype=np.int64)
    for number in members[region]:
        for other in range(1, region):
            if number in members[other] and other not in members[region]:
                below[number] = other
    return below


def fill_holes(index: torch.Tensor) -> torch.Tensor:
    """Return class numbers (X, Y, Z) in which holes have the class of the nearest structure.

    A hole is a connected component of the background (voxels that share a face) that does not reach
    a face of the bounding box around all structures.

    Args:
        index: (X, Y, Z) class numbers.
    """
    labels = index.cpu().numpy().copy()
    boxes = ndimage.find_objects((labels > 0).astype(np.uint8))
    if boxes:
        components, _ = ndimage.label(labels[boxes[0]] == 0)
        faces = []
        for axis in range(3):
            faces += [components.take(0, axis=axis).ravel(), components.take(-1, axis=axis).ravel()]
        is_hole = ~np.isin(np.arange(components.max() + 1), np.concatenate(faces))
        is_hole[0] = False  # component 0 is the structures
        holes = np.zeros(labels.shape, dtype=np.uint8)
        holes[boxes[0]] = is_hole[components]
        _take_nearest_label(labels, holes)
    return torch.from_numpy(labels).to(index.device)


def _take_nearest_label(labels: Array, replaced: Array) -> None:
    """Give each voxel of a mask the label of the nearest voxel outside the mask, in place.

    Args:
        labels: (X, Y, Z) class numbers, changed in place.
        replaced: (X, Y, Z) mask of the voxels to change.
    """
    if not replaced.any():
        return
    # one component at a time: distance transforms of small boxes are much faster than of the volume
    components, _ = ndimage.label(replaced)
    for box in ndimage.find_objects(components):
        wide = widen_box(box, labels.shape)
        nearest = ndimage.distance_transform_edt(
            replaced[wide], return_distances=False, return_indices=True
        )
        labels[wide] = labels[wide][tuple(nearest)]


def outside_grid(
    shape: Sequence[int], affine: Affine, target_affine: Affine, target_shape: Sequence[int]
) -> torch.Tensor:
    """Return which voxels of a target grid lie outside another grid, (X', Y', Z') bool.

    Args:
        shape: size of the other grid, voxels.
        affine: affine of the other grid, voxel → world, mm.
        target_affine: affine of the target grid, voxel → world, mm.
        target_shape: size (X', Y', Z') of the target grid, voxels.
    """
    matrix = np.linalg.inv(affine) @ target_affine
    outside = torch.zeros(tuple(target_shape), dtype=torch.bool)
    for axis, size in enumerate(shape):
        # the position along this axis is the sum of a term for each target axis: broadcasting makes
        # a single array as large as the volume
        x, y, z = (
            torch.from_numpy(matrix[axis, dim] * np.arange(n)).float()
            for dim, n in enumerate(target_shape)
        )
        position = (x[:, None, None] + y[None, :, None] + z) + float(matrix[axis, 3])
        outside |= position < -0.5 - OUTSIDE_TOLERANCE
        outside |= position > size - 0.5 + OUTSIDE_TOLERANCE
    return outside
