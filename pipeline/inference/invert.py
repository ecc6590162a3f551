"""Inversion: from logits on the network's grid to the label map on the file's own grid."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import MapTransform
from numpy.typing import NDArray

from pipeline.config import Spec
from pipeline.inference.aggregator import ScoreBlock
from pipeline.inference.cascade import CascadeNetwork, CoarseProbabilities, FineBox
from pipeline.inference.connected_components import keep_components
from pipeline.inference.cropped_volume import clear_outside
from pipeline.inference.decision_agreement import DecisionAgreement
from pipeline.inference.label_resampling import (
    DEFAULT_INTERPOLATION,
    Interpolation,
    labels_of_blocks,
)
from pipeline.inference.probabilities import ProbabilityCollector
from pipeline.inference.quality_features import (
    QualityCollector,
    QualityFeatures,
    quality_features,
)
from pipeline.inference.refinement import refine_borders
from pipeline.io import Grid
from pipeline.transforms import IMAGE, SCAN, filled_spacing, parallel_axes, separate_axis
from pipeline.types import Affine, Array, LabelMap

PRED = "pred"


@dataclass(frozen=True, kw_only=True, slots=True)
class InvertedLabels:
    """A label map on the grid that it is written on.

    Attributes:
        labels: (X', Y', Z') label map, in the smallest unsigned integer type for its values.
        grid: grid of the label map.
        soft_mm3: soft volume of each class, mm³: the sum of its probabilities times the volume of a
            voxel. None unless the spec has `soft_volumes`.
        uncertainty: (X', Y', Z') float32 entropy of the class probabilities, 0 to 1; None if it was
            not requested.
        probabilities: (N, X', Y', Z') uint8 probability of each of `spec.outputs`, 255 for 1; None
            if they were not requested.
        quality: features from which the Dice is predicted; None if they were not requested.
    """

    labels: LabelMap
    grid: Grid
    soft_mm3: tuple[float, ...] | None = None
    uncertainty: Array | None = None
    probabilities: NDArray[np.uint8] | None = None
    quality: QualityFeatures | None = None


class LabelInversion(MapTransform):
    """Converts logits on the network's grid to a label map on the file's own grid.

    It is a MONAI transform of `pred`: logits (classes, X, Y, Z) from any inferer → MetaTensor
    (1, X', Y', Z') with the values of the spec's labels. The grids come from `image`, and the
    intensities for `spec.refine` from `scan`. `from_blocks` does the same without MONAI's dict, for
    logits that are computed block by block.

    Args:
        spec: gives the labels' values, `output`, `soft_volumes`, `refine`, `crop_resize` and the
            rules for connected components.
        uncertainty: whether the entropy of the class probabilities is computed.
        probabilities: whether the probability of each of `spec.outputs` is computed on the grid of
            the label map, with 1 byte per output and voxel. They are the network's: refinement and
            connected components do not change them.
        cascade: second network of the bundle; None leaves the labels of the first one.
    """

    def __init__(
        self,
        spec: Spec,
        *,
        uncertainty: bool = False,
        probabilities: bool = False,
        cascade: CascadeNetwork | None = None,
    ) -> None:
        super().__init__(PRED)
        self.spec, self.uncertainty, self.probabilities = spec, uncertainty, probabilities
        self.cascade = cascade
        values = list(spec.labels.values())
        self.values: LabelMap = np.array(values, dtype=np.min_scalar_type(max(values)))

    def on_device(self, device: torch.device) -> LabelInversion:
        """Return the same inversion with its second network, if it has one, on another device."""
        moved = copy.copy(self)
        if self.cascade is not None:
            moved.cascade = self.cascade.on_device(device)
        return moved

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        case = dict(data)
        pred, image = case[PRED], case[IMAGE]
        if not isinstance(pred, InvertedLabels):  # `streaming_iteration` has inverted the logits
            logits = pred.as_tensor() if isinstance(pred, MetaTensor) else pred
            shape = tuple(logits.shape[1:])
            block = ScoreBlock(start=(0, 0, 0), scores=logits.float(), shape=shape)
            pred = self.from_blocks(iter([block]), image, case.get(SCAN))
        meta = {**image.meta, "affine": pred.grid.affine}
        case[PRED] = MetaTensor(torch.from_numpy(pred.labels)[None], meta=meta)
        return case

    def from_blocks(
        self,
        blocks: Iterator[ScoreBlock],
        image: MetaTensor,
        scan: MetaTensor | None = None,
        quality: QualityCollector | None = None,
    ) -> InvertedLabels:
        """Return the label map of a volume from blocks of its logits.

        Args:
            blocks: blocks of logits (classes, x, y, z), in any order; changed in place.
            image: (C, X, Y, Z) image on the network's grid; its `meta` has the label map's grid.
            scan: (C, I, J, K) intensities as read, for `spec.refine` and the second network of a
                cascade; None does without both.
            quality: collects the features of the predicted Dice; None collects nothing.
        """
        own = np.asarray(image.affine, dtype=np.float64)
        grid = Grid.from_meta(image.meta)
        uncertainty = torch.zeros(grid.shape) if self.uncertainty else None
        contested = self.spec.contested if scan is not None else ()
        regions = self.spec.output == "regions"
        collector = ProbabilityCollector(contested, regions=regions)
        coarse = None if self.cascade is None or scan is None else CoarseProbabilities()
        needs_collector = self.spec.soft_volumes or contested
        for observer in (collector if needs_collector else None, quality, coarse):
            if observer is not None:
                blocks = observer.pass_through(blocks)
        probabilities = None
        if self.probabilities:
            outputs = len(self.spec.outputs)
            probabilities = torch.zeros((outputs, *grid.shape), dtype=torch.uint8)
        labels_on_grid = partial(
            labels_of_blocks,
            target_affine=grid.affine,
            target_shape=grid.shape,
            output=self.spec.output,
            interpolation=_interpolation(self.spec, own, grid.affine),
            uncertainty=uncertainty,
            probabilities=probabilities,
        )
        index = labels_on_grid(blocks, own)
        agreement = None if quality is None else quality.networks
        fine = self._fine_box(coarse, own, scan, agreement)
        if fine is not None:
            block, box_affine = fine.as_block()
            index = labels_on_grid(iter([block]), box_affine, index=index)
        if self.spec.crop_to_nonzero:
            has_background = self.spec.output == "softmax"
            clear_outside(
                own,
                image.shape[1:],
                grid,
                index,
                uncertainty,
                probabilities,
                has_background=has_background,
            )
        if scan is not None and collector.maps is not None:
            index = refine_borders(index, grid.affine, scan, collector.maps, own, self.spec)
        soft_mm3 = self._soft_volumes(collector, own, fine) if self.spec.soft_volumes else None
        labels = self._output_values(keep_components(index[None], image, self.spec)[0])
        features = None
        if quality is not None:
            read_affine = np.asarray(image.meta.get("original_affine", grid.affine))
            features = quality_features(quality, labels, grid.affine, self.spec, own, read_affine)
        return InvertedLabels(
            labels=labels,
            grid=grid,
            soft_mm3=soft_mm3,
            uncertainty=None if uncertainty is None else uncertainty.numpy(),
            probabilities=None if probabilities is None else probabilities.numpy(),
            quality=features,
        )

    def _fine_box(
        self,
        coarse: CoarseProbabilities | None,
        affine: Affine,
        scan: MetaTensor | None,
        agreement: DecisionAgreement | None,
    ) -> FineBox | None:
        """Return what the second network adds; None without one, or without its structures."""
        if self.cascade is None or coarse is None or scan is None:
            return None
        return self.cascade.fine_box(coarse, affine, scan, agreement)

    def _soft_volumes(
        self, collector: ProbabilityCollector, affine: Affine, fine: FineBox | None
    ) -> tuple[float, ...]:
        """Return the soft volume of each class, mm³."""
        volumes = collector.voxels * abs(float(np.linalg.det(affine[:3, :3])))
        if fine is not None:
            volumes = volumes + fine.gained_mm3
        return tuple(volumes.tolist())

    def _output_values(self, index: torch.Tensor) -> LabelMap:
        """Return the label map with the spec's values in place of class numbers."""
        numbers = index.cpu().numpy()
        is_identity = np.array_equal(self.values, np.arange(len(self.values)))
        if is_identity and numbers.dtype == self.values.dtype:
            return numbers
        values: LabelMap = self.values[numbers]
        return values


def _interpolation(spec: Spec, affine: Affine, labels_affine: Affine) -> Interpolation:
    """Return how logits are interpolated on the grid of a label map.

    Args:
        spec: gives `resampling` and `spacing`.
        affine: affine of the network's grid, voxel → world, mm.
        labels_affine: affine of the label map's grid, likewise.
    """
    resampling = spec.resampling
    matrix = np.linalg.inv(affine) @ labels_affine
    axes = parallel_axes(matrix, (2, 2, 2))
    if resampling is None or axes is None:
        return DEFAULT_INTERPOLATION
    spacing = np.linalg.norm(labels_affine[:3, :3], axis=0)
    target = [float(spacing[axes.index(axis)]) for axis in range(3)]
    # the spec's, because the network's grid has rounded sizes and so a slightly different spacing
    source = filled_spacing(spec.spacing, target)
    across = separate_axis(source, target, resampling.separate_logits)
    nearest = set()
    for axis in range(3):
        order = resampling.logits_order_across if axis == across else resampling.logits_order
        if order == 0:
            nearest.add(axis)
    return Interpolation(of_logits=True, nearest=frozenset(nearest))
