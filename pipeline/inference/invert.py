"""From the network's logits to a label map on the grid that the labels are written on."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import MapTransform

from pipeline.config import Spec
from pipeline.inference.aggregator import ScoreBlock
from pipeline.inference.connected_components import keep_components
from pipeline.inference.label_resampling import labels_of_blocks
from pipeline.inference.probabilities import ProbabilityCollector
from pipeline.inference.refinement import refine_borders
from pipeline.io import Grid
from pipeline.transforms import IMAGE, SCAN
from pipeline.types import Array, LabelMap

PRED = "pred"


@dataclass(frozen=True, kw_only=True, slots=True)
class InvertedLabels:
    """A label map on its final grid.

    Attributes:
        labels: (X', Y', Z') output values in the smallest unsigned type that holds them all.
        grid: of the labels.
        soft_mm3: each class's volume by its probabilities, mm³, if the spec asks for it.
        uncertainty: (X', Y', Z') float32, the entropy of the scores from 0 to 1, where asked for.
    """

    labels: LabelMap
    grid: Grid
    soft_mm3: tuple[float, ...] | None = None
    uncertainty: Array | None = None


class LabelInversion(MapTransform):
    """Turns logits on the network's grid into output values on the grid of the label map.

    As a MONAI transform it replaces `pred`, logits (classes, X, Y, Z) from any inferer, by a
    MetaTensor (1, X', Y', Z') of output values; `image` gives both grids, and `scan`, where the
    spec refines borders, the intensities. `from_blocks` does the same for logits that come block by
    block.

    Args:
        spec: output values, soft volumes, refinement and connected components.
        uncertainty: whether the entropy of the scores is computed.
    """

    def __init__(self, spec: Spec, *, uncertainty: bool = False) -> None:
        super().__init__(PRED)
        self.spec, self.uncertainty = spec, uncertainty
        values = list(spec.labels.values())
        self.values: LabelMap = np.array(values, dtype=np.min_scalar_type(max(values)))

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        case = dict(data)
        pred, image = case[PRED], case[IMAGE]
        if not isinstance(pred, InvertedLabels):  # our engine's iteration inverts block by block
            logits = pred.as_tensor() if isinstance(pred, MetaTensor) else pred
            shape = tuple(logits.shape[1:])
            block = ScoreBlock(start=(0, 0, 0), scores=logits.float(), shape=shape)
            pred = self.from_blocks(iter([block]), image, case.get(SCAN))
        meta = {**image.meta, "affine": pred.grid.affine}
        case[PRED] = MetaTensor(torch.from_numpy(pred.labels)[None], meta=meta)
        return case

    def from_blocks(
        self, blocks: Iterator[ScoreBlock], image: MetaTensor, scan: MetaTensor | None = None
    ) -> InvertedLabels:
        """Return the label map of logits that come block by block.

        Args:
            blocks: of logits (classes, x, y, z), in any order; changed in place.
            image: (C, X, Y, Z) on the network's grid; its `meta` holds the grid of the labels.
            scan: (C, I, J, K) intensities as read, for `refine`; None leaves borders as they are.
        """
        own = np.asarray(image.affine, dtype=np.float64)
        grid = Grid.from_meta(image.meta)
        uncertainty = torch.zeros(grid.shape) if self.uncertainty else None
        contested = self.spec.contested if scan is not None else ()
        collector = ProbabilityCollector(contested)
        if self.spec.soft_volumes or contested:
            blocks = collector.pass_through(blocks)
        index = labels_of_blocks(blocks, own, grid.affine, grid.shape, uncertainty=uncertainty)
        if scan is not None and collector.maps is not None:
            index = refine_borders(index, grid.affine, scan, collector.maps, own, self.spec)
        soft_mm3 = None
        if self.spec.soft_volumes:
            voxel_mm3 = abs(float(np.linalg.det(own[:3, :3])))
            soft_mm3 = tuple((collector.voxels * voxel_mm3).tolist())
        return InvertedLabels(
            labels=self._output_values(keep_components(index[None], image, self.spec)[0]),
            grid=grid,
            soft_mm3=soft_mm3,
            uncertainty=None if uncertainty is None else uncertainty.numpy(),
        )

    def _output_values(self, index: torch.Tensor) -> LabelMap:
        """Return class numbers as output values."""
        numbers = index.cpu().numpy()
        is_identity = np.array_equal(self.values, np.arange(len(self.values)))
        if is_identity and numbers.dtype == self.values.dtype:
            return numbers
        values: LabelMap = self.values[numbers]
        return values
