"""Features from which the Dice of a segmentation is predicted, computed while it is made.

Sums over voxels are collected on the network's grid, block by block, as the logits pass by. They
change no label, need no second run of the network and do not depend on how windows are grouped: a
block adds only voxels, and pairs of neighbours within a plane, that no block before it held.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log, nan, prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.config import OutputKind, Spec
from pipeline.inference.aggregator import HALO, ScoreBlock
from pipeline.inference.block_observer import BlockObserver
from pipeline.inference.decision_agreement import DecisionAgreement
from pipeline.inference.probabilities import structure_probabilities
from pipeline.inference.test_time_augmentation import other_side
from pipeline.inference.volumes import volumes_mm3
from pipeline.types import Affine, Array, LabelMap

# logits of a window for which one more plane out of three is left out: a second for each 40 million
VALUES_PER_STEP, LARGEST_PLANE_STEP = 8_000_000, 3
# logits of a slab of logits whose probabilities are held at a time: their memory stays small
SLAB_VALUES = 8_000_000
# features of each structure, in the order in which they are stored
LABEL_FEATURES = (
    "entropy",
    "confidence",
    "border_entropy",
    "soft_ratio",
    "mirror_dice",
    "networks_dice",
    "asymmetry",
    "log_volume",
    "edge",
    "kept",
    "contrast",
    "deviation",
    "clipped",
)
# features of a case as a whole
CASE_FEATURES = (
    "missing",
    "voxel_mm",
    "anisotropy",
    "class_contrast",
    "background_step",
)
SMALLEST = 1e-6  # added before a logarithm or a division


@dataclass(frozen=True, kw_only=True, slots=True)
class QualityFeatures:
    """Features of one segmented case.

    Attributes:
        case: one of `CASE_FEATURES` → value; nan where it cannot be computed.
        labels: structure that has voxels → one of `LABEL_FEATURES` → value; nan likewise.
    """

    case: Mapping[str, float]
    labels: Mapping[str, Mapping[str, float]]

    def columns(self) -> dict[str, Any]:
        """Return the features as plain values for a record, without those that are nan."""
        labels = {name: _known(row) for name, row in self.labels.items()}
        return {"case": _known(self.case), "labels": labels}


def stored_features(columns: Mapping[str, Any]) -> QualityFeatures:
    """Return the features of a record, from `QualityFeatures.columns`."""
    labels = {}
    for name, row in columns["labels"].items():
        labels[name] = {feature: float(row.get(feature, nan)) for feature in LABEL_FEATURES}
    case = {feature: float(columns["case"].get(feature, nan)) for feature in CASE_FEATURES}
    return QualityFeatures(case=case, labels=labels)


def _known(row: Mapping[str, float]) -> dict[str, float]:
    return {name: float(f"{value:.6g}") for name, value in row.items() if np.isfinite(value)}


@dataclass(kw_only=True)
class ClassSums:
    """Sums over the voxels of each class on the network's grid, each (C,) float64.

    Attributes:
        voxels: number of voxels.
        entropy: sum of the entropy, 0 to 1, of its voxels.
        confidence: sum of the probability of the class in its voxels.
        soft: sum of the probability of the class in all voxels.
        intensity: sum of the intensity, first channel.
        squares: sum of its square.
        clipped: voxels with the lowest or highest intensity of the volume.
        faces: pairs of neighbours within a plane of which exactly one belongs to the class.
        face_entropy: sum of the mean entropy of such a pair.
        face_step: sum of the difference in intensity of such a pair.
        inner: pairs of neighbours within a plane that both belong to the class.
        inner_step: sum of the difference in intensity of such a pair.
    """

    voxels: NDArray[np.float64]
    entropy: NDArray[np.float64]
    confidence: NDArray[np.float64]
    soft: NDArray[np.float64]
    intensity: NDArray[np.float64]
    squares: NDArray[np.float64]
    clipped: NDArray[np.float64]
    faces: NDArray[np.float64]
    face_entropy: NDArray[np.float64]
    face_step: NDArray[np.float64]
    inner: NDArray[np.float64]
    inner_step: NDArray[np.float64]

    @classmethod
    def zeros(cls, classes: int) -> ClassSums:
        """Return sums over nothing."""
        return cls(**{name: np.zeros(classes) for name in cls.__dataclass_fields__})

    def add(self, other: ClassSums, place: slice | int = slice(None)) -> None:
        """Add other sums.

        Args:
            other: sums of all classes, or of background and one structure.
            place: number of that structure.
        """
        for name in self.__dataclass_fields__:
            found = getattr(other, name)
            getattr(self, name)[place] += found[1] if isinstance(place, int) else found


class QualityCollector(BlockObserver):
    """Collects what the features need from blocks of logits, without changing them.

    Args:
        image: (C, X, Y, Z) image on the network's grid, normalised.
        spec: gives labels, `output`, `tta_mirror` and `cascade`.

    Attributes:
        plane_step: every how many-th plane across the first axis is looked at: 1 for a network with
            few labels and small windows, more where looking at all of them would take longer.
        sums: sums over the voxels of each class in these planes, the background first.
        mirror: agreement of mirror images, for the inferer; None if the spec does not mirror.
        networks: agreement of both networks of a cascade, for the second one; None without one.
    """

    def __init__(self, image: torch.Tensor, spec: Spec) -> None:
        self.output: OutputKind = spec.output
        self.classes = len(spec.labels)
        values = self.classes * prod(spec.roi_size)
        self.plane_step = min(LARGEST_PLANE_STEP, max(1, round(values / VALUES_PER_STEP)))
        self.sums = ClassSums.zeros(self.classes)
        self.mirror = DecisionAgreement(spec.output) if spec.tta_mirror else None
        self.networks = DecisionAgreement(spec.output) if spec.cascade else None
        channel = image[0]
        plain = channel.as_tensor() if hasattr(channel, "as_tensor") else channel
        self._intensity: Array = plain.cpu().float().numpy()
        self._range = (float(self._intensity.min()), float(self._intensity.max()))

    def add(self, block: ScoreBlock) -> None:
        """Add the planes of a block that count, slab by slab: little memory is needed besides it.

        A block repeats the last voxels of the one before it, which must count once only.
        """
        new = tuple(slice(HALO if start else 0, None) for start in block.start)
        first = block.start[0] + (new[0].start or 0)
        first += -first % self.plane_step  # planes are counted from the edge of the volume
        stop = block.start[0] + block.scores.shape[1]
        thickness = max(1, SLAB_VALUES // max(1, block.scores[:, :1].numel())) * self.plane_step
        for begin in range(first, stop, thickness):
            planes = slice(begin, min(begin + thickness, stop), self.plane_step)
            inside = slice(begin - block.start[0], planes.stop - block.start[0], self.plane_step)
            self._add_planes(planes, block.start[1:], block.scores[:, inside], new[1:])

    def _add_planes(
        self,
        planes: slice,
        start: Sequence[int],
        scores: torch.Tensor,
        new_in_plane: tuple[slice, ...],
    ) -> None:
        new = (slice(None), *new_in_plane)
        sizes = scores.shape[2:]
        box = (slice(s, s + n) for s, n in zip(start, sizes, strict=True))
        intensity = self._intensity[planes, *box]
        if self.output != "regions":
            certainty, soft = _certainty(scores, new)
            self.sums.add(_class_sums(certainty, intensity, self._range, new, self.classes))
            self.sums.soft += soft
            return
        for number in range(1, self.classes):
            probability = structure_probabilities(scores[[0, number]])[0].cpu().numpy()
            certainty = _region_certainty(probability)
            found = _class_sums(certainty, intensity, self._range, new, 2)
            found.soft[1] = probability[new].sum(dtype=np.float64)
            self.sums.add(found, number)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Certainty:
    """The decision in each voxel of a block, and how certain it is.

    Attributes:
        index: (x, y, z) class number.
        confidence: (x, y, z) probability of that class.
        entropy: (x, y, z) entropy of the probabilities, 0 to 1.
    """

    index: Array
    confidence: Array
    entropy: Array


def _certainty(
    scores: torch.Tensor, new: tuple[slice, ...]
) -> tuple[_Certainty, NDArray[np.float64]]:
    """Return the decision of a softmax in each voxel, and the soft voxels of each class.

    Args:
        scores: (C, x, y, z) logits.
        new: the voxels that count for the soft voxels, (C,).
    """
    highest, index = scores.max(dim=0)
    centred = scores - highest
    weights = centred.exp()
    total = weights.sum(dim=0)
    # entropy = log of the sum of exp(logit) - mean logit: one logarithm per voxel
    mean = torch.einsum("cxyz,cxyz->xyz", weights, centred) / total
    entropy = ((total.log() - mean) / log(max(2, len(scores)))).clamp(min=0)
    confidence = 1 / total
    soft = torch.einsum("cxyz,xyz->cx", weights[(slice(None), *new)], confidence[new])
    certainty = _Certainty(
        index=index.cpu().numpy(),
        confidence=confidence.cpu().numpy(),
        entropy=entropy.cpu().numpy(),
    )
    return certainty, soft.cpu().numpy().sum(axis=1, dtype=np.float64)


def _region_certainty(probability: Array) -> _Certainty:
    """Return the decision on one region in each voxel, from its probability (x, y, z)."""
    inside = probability > 0.5
    p = np.clip(probability.astype(np.float64), SMALLEST, 1 - SMALLEST)
    entropy = -(p * np.log(p) + (1 - p) * np.log(1 - p)) / log(2)
    confidence = np.where(inside, probability, 1 - probability)
    return _Certainty(index=inside.astype(np.int64), confidence=confidence, entropy=entropy)


def _class_sums(
    certainty: _Certainty,
    intensity: Array,
    limits: tuple[float, float],
    new: tuple[slice, ...],
    classes: int,
) -> ClassSums:
    """Return the sums over the voxels of a block, and over pairs of them, without `soft`.

    Args:
        certainty: decision in each voxel (x, y, z) of the block.
        intensity: (x, y, z) intensities.
        limits: lowest and highest intensity of the whole volume.
        new: the voxels of the block that no block before it held.
        classes: C, number of classes.
    """
    sums = ClassSums.zeros(classes)
    index, grey = certainty.index[new].ravel(), intensity[new].ravel()

    def per_class(weights: Array | None = None) -> NDArray[np.float64]:
        return np.bincount(index, weights, minlength=classes).astype(np.float64)

    sums.voxels += per_class()
    sums.entropy += per_class(certainty.entropy[new].ravel())
    sums.confidence += per_class(certainty.confidence[new].ravel())
    sums.intensity += per_class(grey)
    sums.squares += per_class(grey.astype(np.float64) ** 2)
    sums.clipped += per_class((grey <= limits[0]) | (grey >= limits[1]))
    for axis in range(1, certainty.index.ndim):  # neighbouring planes may not be there
        _add_pairs(sums, certainty, intensity, new, axis, classes)
    return sums


def _add_pairs(
    sums: ClassSums,
    certainty: _Certainty,
    intensity: Array,
    new: tuple[slice, ...],
    axis: int,
    classes: int,
) -> None:
    """Add the pairs of neighbours along one axis whose second voxel is new."""
    first, second = list(new), list(new)
    # the block holds one voxel before its first new one, or begins at the edge of the volume
    first[axis], second[axis] = slice(None, -1), slice(1, None)
    one, two = tuple(first), tuple(second)
    left, right = certainty.index[one], certainty.index[two]
    step = np.abs(intensity[two] - intensity[one])
    differ = left != right
    same = ~differ
    within = left[same]
    sums.inner += np.bincount(within, minlength=classes)
    sums.inner_step += np.bincount(within, step[same], minlength=classes)
    entropy = (certainty.entropy[one][differ] + certainty.entropy[two][differ]) / 2
    at_face = step[differ]
    for side in (left[differ], right[differ]):
        sums.faces += np.bincount(side, minlength=classes)
        sums.face_entropy += np.bincount(side, entropy, minlength=classes)
        sums.face_step += np.bincount(side, at_face, minlength=classes)


def quality_features(
    collected: QualityCollector,
    labels: LabelMap,
    affine: Affine,
    spec: Spec,
    network_affine: Affine,
    file_affine: Affine,
) -> QualityFeatures:
    """Return the features of a segmented case.

    Args:
        collected: sums over the blocks of its logits.
        labels: (X, Y, Z) finished label map.
        affine: affine of the label map, voxel → world, mm.
        spec: gives the structures.
        network_affine: affine of the network's grid, likewise.
        file_affine: affine of the image as read, likewise.
    """
    volumes = volumes_mm3(labels, affine, {"": 0, **spec.values_of})
    edge = _edge_voxels(labels, spec.values_of)
    voxel_mm3 = abs(float(np.linalg.det(affine[:3, :3])))
    network_mm3 = abs(float(np.linalg.det(network_affine[:3, :3])))
    mirror = _agreement_dice(collected.mirror, len(spec.labels))
    networks = _agreement_dice(collected.networks, len(spec.labels))
    rows = {}
    for number, name in enumerate(spec.labels):
        if number == 0 or not volumes[name]:
            continue
        row = _label_row(collected.sums, number)
        network_volume = collected.sums.voxels[number] * network_mm3 * collected.plane_step
        row["mirror_dice"] = mirror[number]
        row["networks_dice"] = networks[number]
        row["log_volume"] = log(volumes[name])
        row["asymmetry"] = _asymmetry(name, volumes)
        row["edge"] = edge[name] * voxel_mm3 / volumes[name]
        row["kept"] = log(volumes[name] / network_volume) if network_volume else nan
        rows[name] = {feature: row[feature] for feature in LABEL_FEATURES}
    spacing = np.linalg.norm(file_affine[:3, :3], axis=0)
    case = {
        "missing": 1 - len(rows) / (len(spec.labels) - 1),
        "voxel_mm": log(float(spacing.max())),
        "anisotropy": log(float(spacing.max() / spacing.min())),
        "class_contrast": _class_contrast(collected.sums),
        "background_step": _ratio(collected.sums.inner_step[0], collected.sums.inner[0]),
    }
    return QualityFeatures(case=case, labels=rows)


def _label_row(sums: ClassSums, number: int) -> dict[str, float]:
    """Return the features of one structure that come from the network's grid alone."""
    voxels, faces = sums.voxels[number], sums.faces[number]
    inner = _ratio(sums.inner_step[number], sums.inner[number])
    step = _ratio(sums.face_step[number], faces)
    mean = _ratio(sums.intensity[number], voxels)
    variance = _ratio(sums.squares[number], voxels) - mean**2
    return {
        "entropy": _ratio(sums.entropy[number], voxels),
        "confidence": _ratio(sums.confidence[number], voxels),
        "border_entropy": _ratio(sums.face_entropy[number], faces),
        "soft_ratio": log(sums.soft[number] / voxels + SMALLEST) if voxels else nan,
        "contrast": log((step + SMALLEST) / (inner + SMALLEST)) if faces and voxels else nan,
        "deviation": log(max(0.0, variance) ** 0.5 + SMALLEST) if voxels else nan,
        "clipped": _ratio(sums.clipped[number], voxels),
    }


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole else nan


def _class_contrast(sums: ClassSums) -> float:
    """Return the logarithm of the contrast between structures over the noise within them.

    The contrast is the standard deviation of the structures' mean intensities, weighted by their
    voxels; the noise is the mean difference between neighbouring voxels of one structure.
    """
    present = sums.voxels > 0
    present[0] = False
    if present.sum() < 2 or not sums.inner[present].sum():
        return nan
    voxels = sums.voxels[present]
    means = sums.intensity[present] / voxels
    centre = np.average(means, weights=voxels)
    contrast = np.average((means - centre) ** 2, weights=voxels) ** 0.5
    noise = sums.inner_step[present].sum() / sums.inner[present].sum()
    return float(np.log((contrast + SMALLEST) / (noise + SMALLEST)))


def _agreement_dice(agreement: DecisionAgreement | None, classes: int) -> NDArray[np.float64]:
    """Return the agreement on each label, the background first; nan where unknown."""
    found = np.full(classes, nan)
    if agreement is None or not len(agreement.common):
        return found
    dice = agreement.dice
    found[classes - len(dice) :] = dice  # only a softmax has a channel for the background
    return found


def _asymmetry(name: str, volumes: Mapping[str, float]) -> float:
    """Return the difference of a structure and that of the other side, as a part of their sum.

    It is 0 for a structure without a side, and 1 where the other one has no voxels.
    """
    other = other_side(name)
    if other == name or other not in volumes:
        return 0.0
    return abs(volumes[name] - volumes[other]) / (volumes[name] + volumes[other])


def _edge_voxels(labels: LabelMap, values_of: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Return the voxels of each structure on the six faces of a volume, edges counted twice."""
    faces = []
    for axis in range(labels.ndim):
        faces += [labels.take(0, axis=axis).ravel(), labels.take(-1, axis=axis).ravel()]
    values, counts = np.unique(np.concatenate(faces), return_counts=True)
    found = dict(zip(values.tolist(), counts.tolist(), strict=True))
    return {name: sum(found.get(one, 0) for one in values) for name, values in values_of.items()}
