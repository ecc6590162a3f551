"""A bundle of volseg's, opened for inference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from monai.inferers import Inferer
from torch import nn

from pipeline.config import BundlePaths, Spec, spec_fingerprint
from pipeline.inference import memory_plan, predictor
from pipeline.inference.case_model import Prediction, PreparedCase
from pipeline.inference.invert import LabelInversion
from pipeline.inference.predicted_quality import QualityModel, read_quality
from pipeline.inference.runtime import Runtime
from pipeline.inference.sliding_window import WindowInferer
from pipeline.io import (
    LABELS_ENDING,
    PROBABILITIES_ENDING,
    UNCERTAINTY_ENDING,
    Header,
    sha256,
)
from pipeline.log import LOGGER
from pipeline.transforms import Preprocessing, network_grid_shape
from pipeline.types import PathOrStr


@dataclass(frozen=True, kw_only=True)
class Model:
    """A bundle opened for inference: everything that the prediction of a case needs.

    It is a `CaseModel`.

    Attributes:
        root: folder of the bundle.
        spec: inputs and outputs that the weights were trained for.
        preprocessing: transform from the files of a case to the image on the network's grid.
        network: network with its weights, in the runtime that was chosen, (B, C, *roi_size) →
            logits.
        inferer: inferer that applies the network to an image of any size.
        inversion: transform from logits to a label map on the grid of the file.
        device: device that the network runs on.
        max_memory: largest resident memory of the process, bytes; None sets no limit.
        keep_quality_features: whether predictions hold the features from which a fit of the
            predicted Dice is made.
    """

    root: PathOrStr
    spec: Spec
    preprocessing: Preprocessing
    network: nn.Module
    inferer: Inferer
    inversion: LabelInversion
    device: torch.device
    max_memory: int | None = None
    keep_quality_features: bool = False

    @cached_property
    def quality(self) -> QualityModel | None:
        """Fits of the predicted Dice; None if the bundle has none for its weights.

        Raises:
            ConfigError: its file holds something else.
        """
        paths = BundlePaths(self.root)
        found = read_quality(paths.quality)
        if found is None or found.weights_sha256 == sha256(paths.weights):
            return found
        LOGGER.warning(
            "%s: fitted for other weights, so that no Dice is predicted; remove the file, or fit "
            "it again",
            paths.quality,
        )
        return None

    @property
    def channels(self) -> tuple[str, ...]:
        """Names of the input channels, one file each."""
        return self.spec.channels

    @property
    def fallback_channel(self) -> str | None:
        """Channel whose file is also used for channels without one; None requires all files."""
        return self.spec.fallback_channel

    @property
    def labels(self) -> Mapping[str, int]:
        """Name → value of the labels in label maps, background first."""
        return self.spec.labels

    @property
    def endings(self) -> tuple[str, ...]:
        """Endings of the files that each case gets."""
        endings = [LABELS_ENDING]
        if self.inversion.uncertainty:
            endings.append(UNCERTAINTY_ENDING)
        if self.inversion.probabilities:
            endings.append(PROBABILITIES_ENDING)
        return tuple(endings)

    def limited(self, max_memory: int | None) -> Model:
        """Return the same model with another limit of its memory, bytes; None for no limit."""
        return replace(self, max_memory=max_memory)

    def on_device(self, device: torch.device) -> Model:
        """Return the same model on another device."""
        inversion = self.inversion.on_device(device)
        return replace(self, device=device, network=self.network.to(device), inversion=inversion)

    def identity(self) -> dict[str, str]:
        """Return what else than the bundle's code decides the voxels: weights and settings."""
        paths, reader = BundlePaths(self.root), self.preprocessing.reader
        return {
            "weights_sha256": sha256(paths.weights),
            "spec_sha256": spec_fingerprint(self.spec),
            "int8_model_sha256": self._int8_model(paths),
            "cascade_sha256": self._cascade_weights(paths),
            "overlap": str(getattr(self.inferer, "overlap", "")),
            "volume": str(reader.volume),
            "labels_spacing": str(reader.labels_spacing),
        }

    def _int8_model(self, paths: BundlePaths) -> str:
        """Return the hash of the int8 model if it computes: other calibrations, other voxels."""
        if getattr(self.network, "precision", "") != "int8" or not paths.int8_model.is_file():
            return ""
        return sha256(paths.int8_model)

    def _cascade_weights(self, paths: BundlePaths) -> str:
        """Return the hash of the weights of the second network, if it is used."""
        used = self.inversion.cascade is not None and paths.cascade_weights.is_file()
        return sha256(paths.cascade_weights) if used else ""

    def prepare(self, image: Any, scratch: Path | None = None) -> PreparedCase:
        """Return a case after reading and preprocessing; see `predictor.prepare`.

        Args:
            image: of the case.
            scratch: not used: nothing temporary is written.
        """
        return predictor.prepare(self, image)

    def predict(self, prepared: PreparedCase) -> Prediction:
        """Return the prediction for a case from `prepare`; see `predictor.predict_prepared`."""
        return predictor.predict_prepared(self, prepared)

    def predict_case(self, image: Any, scratch: Path | None = None) -> Prediction:
        """Return the prediction for one case; see `predictor.predict_case`.

        Args:
            image: of the case.
            scratch: not used: nothing temporary is written.
        """
        return predictor.predict_case(self, image)

    @property
    def asked_runtime(self) -> Mapping[str, str] | None:
        """`runtime` and `precision` as asked for; None for a network that has no choice."""
        if not isinstance(self.network, Runtime):
            return None
        return {"runtime": self.network.runtime, "precision": self.network.precision}

    def follow_runtime(self, decided: Mapping[str, str]) -> None:
        """Ask for the runtime and precision that were decided before."""
        for key, value in decided.items():
            setattr(self.network, key, value)
        if self.inversion.cascade is not None:
            self.inversion.cascade.follow_runtime(decided)

    def prepare_runtime(
        self, image: Any = None, scratch: Path | None = None
    ) -> dict[str, Any] | None:
        """Prepare the network, and describe what really computes it.

        Args:
            image: not used: no case decides it.
            scratch: not used: nothing temporary is written.

        Returns:
            None for a network that is not ours to prepare.

        Raises:
            ConfigError: the runtime or the precision is not available.
        """
        if not isinstance(self.network, Runtime):
            return None
        description = asdict(self.network.prepare(self.device))
        if self.inversion.cascade is not None:
            self.inversion.cascade.prepare()
        return description

    @property
    def description(self) -> dict[str, Any] | None:
        """What really computes the network; None before it is prepared."""
        description = getattr(self.network, "description", None)
        return None if description is None else asdict(description)

    def ready_bytes(self) -> int:
        """Run the network once, on an empty window, and return the process's memory, bytes."""
        return memory_plan.ready_bytes(self)

    def peak_bytes(self, headers: Sequence[Header], base: int) -> int:
        """Return an estimate of the process's highest memory for a case, bytes.

        Args:
            headers: of the case's files, one per channel.
            base: memory of the process before the case, bytes.
        """
        return memory_plan.estimate_memory(self, headers, base).peak

    def window_count(self, header: Header) -> int:
        """Return how many windows cover a volume; the network may compute fewer, or some twice."""
        grid = network_grid_shape(self.spec, header)
        if not isinstance(self.inferer, WindowInferer):
            return max(1, prod(grid) // prod(self.spec.roi_size))
        windows = self.inferer.windows(grid, len(self.spec.labels), None)
        return prod(len(starts) for starts in windows.starts)
