"""What a batch needs of a model: its inputs and outputs, and the prediction of one case."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.inference.predicted_quality import PredictedDice
from pipeline.inference.quality_features import QualityFeatures
from pipeline.io import Header
from pipeline.types import Affine, Array, LabelMap, PathOrStr


@dataclass(frozen=True, kw_only=True)
class PreparedCase:
    """A case that was read and preprocessed.

    Attributes:
        case: the case with `image` (C, X, Y, Z) on the network's grid and, if the spec has
            `refine`, `scan` (C, I, J, K): the intensities as read.
        seconds: name of each step so far (`read`, `preprocess`) → its wall time.
    """

    case: dict[Hashable, Any]
    seconds: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The result of one case.

    Attributes:
        labels: (X, Y, Z) label map, on the grid of the file or with the voxel size that was
            requested; (N, X, Y, Z) masks, 0 or 1, of a model whose labels overlap.
        affine: affine of the label map, voxel → RAS+ world, mm.
        header: bytes of a NIfTI header for the label map's grid; empty if the input was in another
            format.
        warnings: reasons to check the case by eye.
        seconds: name of each step → its wall time.
        volumes_mm3: name of each structure and of each sum in the spec → volume, mm³.
        uncertainty: (X, Y, Z) entropy of the class probabilities, 0 to 1; None if it was not
            requested.
        probabilities: (N, X, Y, Z) uint8 probability of each of `spec.outputs`, 255 for 1; None if
            they were not requested.
        predicted_dice: predicted Dice of the case and of each structure; None if the bundle has no
            fit of it.
        quality_features: what such a fit is made from; None if it was not requested.
    """

    labels: LabelMap
    affine: Affine
    header: bytes
    warnings: tuple[str, ...]
    seconds: dict[str, float]
    volumes_mm3: dict[str, float]
    uncertainty: Array | None = None
    probabilities: NDArray[np.uint8] | None = None
    predicted_dice: PredictedDice | None = None
    quality_features: QualityFeatures | None = None


class CaseModel(Protocol):
    """A model that segments cases: a bundle of volseg's, or one of MONAI's form.

    A batch knows nothing else of it. A model is pickled for worker processes that are not forked.
    """

    @property
    def root(self) -> PathOrStr:
        """Folder of the bundle."""

    @property
    def channels(self) -> tuple[str, ...]:
        """Names of the files that a case consists of."""

    @property
    def fallback_channel(self) -> str | None:
        """Channel whose file is also used for channels without one; None requires all files."""

    @property
    def labels(self) -> Mapping[str, int]:
        """Name → value of the labels in label maps, background first."""

    @property
    def endings(self) -> tuple[str, ...]:
        """Endings of the files that each case gets."""

    @property
    def device(self) -> torch.device:
        """Device that the network runs on."""

    @property
    def max_memory(self) -> int | None:
        """Largest resident memory of the process, bytes; None sets no limit."""

    def limited(self, max_memory: int | None) -> CaseModel:
        """Return the same model with another limit of its memory, bytes; None for no limit."""

    def on_device(self, device: torch.device) -> CaseModel:
        """Return the same model on another device."""

    def identity(self) -> dict[str, str]:
        """Return what else than the bundle's code decides the voxels: weights and settings."""

    def prepare(self, image: Any, scratch: Path | None = None) -> PreparedCase:
        """Return a case after reading and preprocessing; see `pipeline.inference.prepare`.

        Args:
            image: path, nibabel image or SimpleITK image, or a list of them, one per channel.
            scratch: folder for temporary files, if there are any; None for the system's.
        """

    def predict(self, prepared: PreparedCase) -> Prediction:
        """Return the prediction for a case from `prepare`."""

    def predict_case(self, image: Any, scratch: Path | None = None) -> Prediction:
        """Return the prediction for one case, within the limit of the memory."""

    @property
    def asked_runtime(self) -> Mapping[str, str] | None:
        """`runtime` and `precision` as asked for; None for a network that has no choice."""

    def follow_runtime(self, decided: Mapping[str, str]) -> None:
        """Ask for the runtime and precision that were decided before."""

    def prepare_runtime(
        self, image: Any = None, scratch: Path | None = None
    ) -> dict[str, Any] | None:
        """Prepare the network, and describe what really computes it.

        Args:
            image: a case by which a model may decide what computes it; None before the first case.
            scratch: folder for temporary files, if there are any; None for the system's.

        Returns:
            with `runtime` and `precision` at least; None where nothing is decided (yet).
        """

    @property
    def description(self) -> dict[str, Any] | None:
        """What really computes the network; None before it is prepared."""

    def ready_bytes(self) -> int:
        """Run the network once, on an empty window, and return the process's memory, bytes."""

    def peak_bytes(self, headers: Sequence[Header], base: int) -> int:
        """Return an estimate of the process's highest memory for a case, bytes.

        Args:
            headers: of the case's files, one per channel.
            base: memory of the process before the case, bytes.
        """

    def window_count(self, header: Header) -> int:
        """Return how many windows cover a volume; the network may compute fewer, or some twice."""
