"""The second network of a cascade: smaller voxels, in a box around some structures.

The first network finds all structures in voxels that are too large for the small ones. The second
one sees a box of the scan, resampled from its own voxels. Where the two meet, at the faces of the
box, the result passes from one to the other, so that no step is visible.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from nibabel.affines import apply_affine
from numpy.typing import NDArray

from pipeline.config import BundlePaths, Spec
from pipeline.errors import ConfigError
from pipeline.inference.aggregator import ScoreBlock
from pipeline.inference.block_observer import BlockObserver
from pipeline.inference.boxes import box_at, crop_box
from pipeline.inference.decision_agreement import DecisionAgreement
from pipeline.inference.process_memory import release_freed_memory
from pipeline.inference.runtime import Precision, Runtime, RuntimeName
from pipeline.networks import build_network, read_state
from pipeline.transforms import (
    IMAGE,
    Resample,
    axis_samplings,
    normalisation,
    sample_axes,
)
from pipeline.types import Affine, PathOrStr

# distance from a face of the box over which the second network's share rises, voxels. The network
# sees only one side there, and is least certain
FADE_VOXELS = 8
# smallest probability whose logarithm is averaged: float16 holds no much smaller one
MIN_PROBABILITY = 1e-6
SLAB = 8  # voxels along the first axis whose probabilities are averaged at a time
SNAP = 1e-6  # voxels; positions that are closer to a voxel's centre are moved onto it


@dataclass(frozen=True, kw_only=True, slots=True)
class FineBox:
    """The probabilities of both networks together, in the box that the second one sees.

    Attributes:
        scores: (classes, X, Y, Z) logarithms of the probabilities, up to a constant per voxel.
        affine: affine of the box, voxel → world, mm.
        gained_mm3: (classes,) float64: what the soft volume of each class changes by in the box,
            mm³.
    """

    scores: torch.Tensor
    affine: Affine
    gained_mm3: torch.Tensor

    def as_block(self) -> tuple[ScoreBlock, Affine]:
        """Return a block of scores for the voxels inside the box only, and the affine of its grid.

        The grid extends beyond the box by one voxel at each face, so that the box does not stand
        for the voxels outside of it, as a block at the edge of a volume would.
        """
        affine = self.affine.copy()
        affine[:3, 3] -= affine[:3, :3].sum(axis=1)
        shape = tuple(n + 2 for n in self.scores.shape[1:])
        return ScoreBlock(start=(1, 1, 1), scores=self.scores, shape=shape), affine


class CoarseProbabilities(BlockObserver):
    """Keeps the first network's probabilities, where its blocks of logits are."""

    def __init__(self) -> None:
        self._blocks: list[tuple[tuple[int, ...], torch.Tensor]] = []
        self._shape: tuple[int, ...] = ()

    def add(self, block: ScoreBlock) -> None:
        kept = torch.empty(block.scores.shape, dtype=torch.float16)
        for start in range(0, block.scores.shape[1], SLAB):
            slab = slice(start, start + SLAB)
            kept[:, slab] = torch.softmax(block.scores[:, slab], dim=0)
        self._blocks.append((tuple(block.start), kept))
        self._shape = tuple(block.shape)

    def gathered(self) -> tuple[torch.Tensor, tuple[int, ...]] | None:
        """Return the probabilities of all blocks together; the blocks themselves are freed.

        Returns:
            (classes, X, Y, Z) float16 probabilities in a box that contains all blocks and a layer
            of background around them, as far as the volume reaches; and the first voxel of that
            box. None if there is no block.
        """
        if not self._blocks:
            return None
        sizes = [kept.shape[1:] for _, kept in self._blocks]
        first, size = [], []
        for axis, whole in enumerate(self._shape):
            starts = [start[axis] for start, _ in self._blocks]
            stops = [at + n[axis] for at, n in zip(starts, sizes, strict=True)]
            first.append(max(0, min(starts) - 1))
            size.append(min(whole, max(stops) + 1) - first[axis])
        maps = torch.zeros((len(self._blocks[0][1]), *size), dtype=torch.float16)
        maps[0] = 1
        while self._blocks:
            start, kept = self._blocks.pop(0)
            inside = [at - begin for at, begin in zip(start, first, strict=True)]
            crop_box(maps, box_at(inside, kept.shape[1:])).copy_(kept)
        return maps, tuple(first)


def mean_position(maps: torch.Tensor, classes: Sequence[int]) -> torch.Tensor | None:
    """Return the mean position of some classes, (3,) float64 voxels; None if none is found.

    Args:
        maps: (classes, X, Y, Z) probabilities.
        classes: numbers of the classes.
    """
    likely = torch.zeros(maps.shape[1:], dtype=torch.bool)
    for number in classes:
        likely |= maps[number] > 0.5
    if not likely.any():
        return None
    return likely.nonzero().double().mean(dim=0)


class CascadeNetwork:
    """The second network of a cascade, which is read when it is first needed.

    Several threads may use it. A copy or a pickled one reads its weights again.

    Args:
        spec: spec of the bundle, with a cascade.
        bundle_root: the bundle's folder, for the weights.
        device: device that the network runs on.
        runtime: auto, torch or openvino; see `Runtime`.
        precision: of the arithmetic; see `Runtime`. There is no int8 model of the second network:
            with int8 it is computed in float32.
    """

    def __init__(
        self,
        spec: Spec,
        bundle_root: PathOrStr,
        *,
        device: torch.device | str = "cpu",
        runtime: RuntimeName = "auto",
        precision: Precision = "auto",
    ) -> None:
        own = spec.cascade_spec
        if spec.cascade is None or own is None:
            raise ConfigError("spec.cascade: expected a second network, got null")
        self.spec, self.structures, self.share = own, spec.cascade.structures, spec.cascade.share
        self.paths, self.device = BundlePaths(bundle_root), torch.device(device)
        self.runtime: RuntimeName = runtime
        self.precision: Precision = "auto" if precision == "int8" else precision
        self._network: Runtime | None = None
        self._reading = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state["_network"] = None
        del state["_reading"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reading = threading.Lock()

    def on_device(self, device: torch.device) -> CascadeNetwork:
        """Return the same network for another device; its weights are read again."""
        moved = copy.copy(self)
        moved.device = device
        return moved

    def follow_runtime(self, decided: Mapping[str, str]) -> None:
        """Ask for the runtime and precision that were decided before, before the first use."""
        self.runtime = decided.get("runtime", self.runtime)  # type: ignore[assignment]
        precision = decided.get("precision", self.precision)
        self.precision = "auto" if precision == "int8" else precision  # type: ignore[assignment]

    def prepare(self) -> Runtime:
        """Return the network, read and ready to run.

        Raises:
            ConfigError: its weights are not there, or do not fit the spec.
        """
        with self._reading:
            if self._network is None:
                self._network = self._read()
                self._network.prepare(self.device)
            return self._network

    def _read(self) -> Runtime:
        path = self.paths.cascade_weights
        if not path.is_file():
            raise ConfigError(
                f"{path}: no such file; the spec has a cascade, whose second network has its "
                "weights there"
            )
        network = build_network(self.spec)
        try:
            network.load_state_dict({name: t.float() for name, t in read_state(path).items()})
        except RuntimeError as error:
            raise ConfigError(f"{path}: does not fit spec.cascade.network: {error}") from error
        runtime = Runtime(
            network.to(self.device).eval(),
            self.spec,
            bundle_root=self.paths.folder,
            runtime=self.runtime,
            precision=self.precision,
        )
        return runtime.eval()

    @torch.no_grad()
    def fine_box(
        self,
        coarse: CoarseProbabilities,
        affine: Affine,
        scan: MetaTensor,
        agreement: DecisionAgreement | None = None,
    ) -> FineBox | None:
        """Return the probabilities of both networks in the box that the second one sees.

        Args:
            coarse: probabilities of the first network.
            affine: affine of its grid, voxel → world, mm.
            scan: (C, I, J, K) intensities as read.
            agreement: counts where both networks agree in the box; None counts nothing.

        Returns:
            None if the first network found none of the structures that the box lies around.
        """
        release_freed_memory()  # of the first network's inversion: as much as the second needs
        names = list(self.spec.labels)
        gathered = coarse.gathered()
        if gathered is None:
            return None
        maps, first = gathered
        centre = mean_position(maps, [names.index(name) for name in self.structures])
        if centre is None:
            return None
        affine = _moved(affine, first)
        box_affine = _box_affine(affine, centre.numpy(), self.spec)
        image = _box_image(scan, box_affine, self.spec)
        release_freed_memory()  # of the resampling: 0.08 GB
        scores = self.prepare()(image[None].to(self.device))[0].float().cpu()
        share = self.share * _fade(self.spec.roi_size)
        gained = torch.zeros(len(scores), dtype=torch.float64)
        probabilities = _box_probabilities(maps, affine, box_affine, self.spec.roi_size)
        del maps
        # slab by slab, or each step would hold another tensor of classes × voxels
        for start in range(0, scores.shape[1], SLAB):
            slab = slice(start, start + SLAB)
            before = probabilities[:, slab].float()
            if agreement is not None:
                decisions = [agreement.decision(one[None]) for one in (scores[:, slab], before)]
                agreement.add(decisions, len(scores))
            mixed = torch.log_softmax(scores[:, slab], dim=0).mul_(share[slab])
            mixed += before.clamp(min=MIN_PROBABILITY).log_().mul_(1 - share[slab])
            scores[:, slab] = mixed
            gained += (torch.softmax(mixed, dim=0) - before).sum((1, 2, 3), dtype=torch.float64)
        voxel_mm3 = abs(float(np.linalg.det(box_affine[:3, :3])))
        return FineBox(scores=scores, affine=box_affine, gained_mm3=gained * voxel_mm3)


def load_cascade(
    spec: Spec,
    bundle_root: PathOrStr,
    device: torch.device | str = "cpu",
    *,
    runtime: RuntimeName = "auto",
    precision: Precision = "auto",
) -> CascadeNetwork | None:
    """Return the second network of a bundle, for its `LabelInversion`; None without a cascade.

    Args:
        spec: spec of the bundle.
        bundle_root: the bundle's folder, for the weights.
        device: device that the network runs on.
        runtime: auto, torch or openvino; see `Runtime`.
        precision: of the arithmetic; see `Runtime`.
    """
    if spec.cascade is None:
        return None
    return CascadeNetwork(spec, bundle_root, device=device, runtime=runtime, precision=precision)


def _box_affine(affine: Affine, centre: NDArray[np.float64], spec: Spec) -> Affine:
    """Return the affine of the box: along the axes of a grid, centred at a voxel of it."""
    spacing = np.array([float(mm) for mm in spec.spacing if mm is not None])
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    box: Affine = np.eye(4)
    box[:3, :3] = directions * spacing
    middle = (np.array(spec.roi_size) - 1) / 2
    box[:3, 3] = affine[:3, :3] @ centre + affine[:3, 3] - box[:3, :3] @ middle
    return box


def _moved(affine: Affine, voxels: Sequence[int]) -> Affine:
    """Return the affine of the part of a grid that begins at a voxel."""
    moved = affine.copy()
    moved[:3, 3] += affine[:3, :3] @ np.asarray(voxels, dtype=np.float64)
    return moved


def _box_image(scan: MetaTensor, box_affine: Affine, spec: Spec) -> torch.Tensor:
    """Return the normalised image in the box, (C, *roi_size) float32; 0 outside the scan."""
    near = _part_near(scan, box_affine, spec.roi_size)
    grey = torch.nan_to_num(near.float(), nan=0.0, posinf=0.0, neginf=0.0)
    resample = Resample(mode="bilinear", padding_mode="border", dtype=np.float64)
    image = resample(grey, dst_affine=torch.from_numpy(box_affine), spatial_size=spec.roi_size)
    normalised = normalisation(spec, IMAGE)({IMAGE: image})[IMAGE]
    matrix = np.linalg.inv(np.asarray(scan.affine, dtype=np.float64)) @ box_affine
    inside = _inside(matrix, spec.roi_size, scan.shape[1:])
    box: torch.Tensor = torch.as_tensor(normalised.as_tensor(), dtype=torch.float32)
    return box * inside


def _part_near(scan: MetaTensor, box_affine: Affine, roi_size: Sequence[int]) -> MetaTensor:
    """Return the part of a scan that a box is resampled from; the whole scan if they do not meet.

    The part extends beyond the box by more than a voxel of either, which linear interpolation and
    the average over a larger voxel need.

    Args:
        scan: (C, I, J, K) intensities.
        box_affine: affine of the box, voxel → world, mm.
        roi_size: size of the box, voxels.
    """
    affine = np.asarray(scan.affine, dtype=np.float64)
    corners = np.array(list(np.ndindex(2, 2, 2))) * (np.array(roi_size) + 1.0) - 1
    places = apply_affine(np.linalg.inv(affine) @ box_affine, corners)
    first = np.floor(places.min(axis=0)).astype(int) - 2
    stop = np.ceil(places.max(axis=0)).astype(int) + 3
    first, stop = first.clip(0), np.minimum(stop, scan.shape[1:])
    if (first >= stop).any():
        return scan
    part = crop_box(scan.as_tensor(), box_at(first.tolist(), (stop - first).tolist()))
    return MetaTensor(part, affine=torch.from_numpy(_moved(affine, first)))


def _inside(matrix: Affine, roi_size: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
    """Return which voxels of the box lie in the scan, (*roi_size) bool.

    Args:
        matrix: voxel of the box → voxel of the scan.
        roi_size: size of the box, voxels.
        shape: size of the scan, voxels.
    """
    inside = torch.ones(tuple(roi_size), dtype=torch.bool)
    for axis in range(3):
        position = torch.full((1, 1, 1), matrix[axis, 3], dtype=torch.float64)
        for dim, size in enumerate(roi_size):
            along = torch.arange(size, dtype=torch.float64) * matrix[axis, dim]
            position = position + along.view([-1 if i == dim else 1 for i in range(3)])
        inside &= (position > -0.5) & (position < shape[axis] - 0.5)
    return inside


def _box_probabilities(
    maps: torch.Tensor, affine: Affine, box_affine: Affine, roi_size: Sequence[int]
) -> torch.Tensor:
    """Return the first network's probabilities in the box, (classes, *roi_size) float16.

    Args:
        maps: (classes, X, Y, Z) probabilities on the first network's grid.
        affine: affine of that grid, voxel → world, mm.
        box_affine: affine of the box, likewise.
        roi_size: size of the box, voxels.
    """
    matrix = np.linalg.inv(affine) @ box_affine
    samplings = axis_samplings(matrix, (0, 1, 2), roi_size, maps.shape[1:], snap=SNAP)
    # the part of the grid that the box lies in, which is resampled several times as fast
    near = [slice(int(axis.low.min()), int(axis.low.max()) + 2) for axis in samplings]
    samplings = [
        replace(axis, low=axis.low - part.start) for axis, part in zip(samplings, near, strict=True)
    ]
    sampled = torch.empty((len(maps), *roi_size), dtype=torch.float16)
    for channel, target in zip(crop_box(maps, near), sampled, strict=True):
        target.copy_(sample_axes(channel.float(), samplings))
    return sampled


def _fade(roi_size: Sequence[int]) -> torch.Tensor:
    """Return the factor on the second network's share, (*roi_size), 0 at the faces to 1 inside."""
    fade = torch.ones(tuple(roi_size))
    for dim, size in enumerate(roi_size):
        along = torch.arange(size, dtype=torch.float32)
        to_face = torch.minimum(along, size - 1 - along)
        rising = (to_face / FADE_VOXELS).clamp(max=1)
        fade = torch.minimum(fade, rising.view([-1 if i == dim else 1 for i in range(3)]))
    return fade
