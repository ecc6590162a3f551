"""For research scripts: from a path or an image in memory to labels on its own grid and their volumes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.bundle import open_bundle
from pipeline.defaults import DEFAULT_BUNDLE
from pipeline.inference import Model, predict_case
from pipeline.io import as_nibabel, as_sitk
from pipeline.types import Affine, Array, LabelMap, PathOrStr


@dataclass(frozen=True, kw_only=True)
class Segmentation:
    """What `segment` gives.

    Attributes:
        image: the label map, on the input's grid or in voxels of the size that `load` was asked for: a SimpleITK image where
            one came in, else a nibabel image.
        labels: the same as an array (X, Y, Z) of output values.
        affine: voxel → RAS+ world, mm.
        volumes_mm3: name → volume of each structure and of the spec's sums, mm³.
        warnings: what is doubtful about the case.
        seconds: wall time of each step.
        uncertainty: (X, Y, Z) from 0 to 1, the entropy of the model's scores, where `load` was asked for it.
    """

    image: Any
    labels: LabelMap
    affine: Affine
    volumes_mm3: dict[str, float]
    warnings: tuple[str, ...]
    seconds: dict[str, float]
    uncertainty: Array | None = None


def load(
    bundle: PathOrStr = DEFAULT_BUNDLE,
    *,
    device: str = "auto",
    overlap: float | None = None,
    runtime: str = "auto",
    precision: str = "auto",
    uncertainty: bool = False,
    labels_spacing: float | None = None,
) -> Model:
    """A bundle opened for `segment`; open it once and use it for many images.

    Args:
        bundle: a folder, or the name of a bundle that ships; by default that of the brain's structures.
        device: auto, cpu, cuda or mps.
        overlap: of neighbouring windows, a fraction, instead of the bundle's own.
        runtime: auto, torch or openvino.
        precision: auto, float32, bfloat16 or int8.
        uncertainty: whether each voxel's uncertainty is wanted.
        labels_spacing: of the label maps' voxels, mm, instead of each image's own.

    Raises:
        PipelineError: no such bundle or device.
    """
    return open_bundle(
        bundle,
        device=device,
        overlap=overlap,
        runtime=runtime,
        precision=precision,
        uncertainty=uncertainty,
        labels_spacing=labels_spacing,
    )


def segment(model: Model, image: Any) -> Segmentation:
    """The segmentation of one image; the same voxels as the command `volseg segment` writes.

    Args:
        model: from `load`.
        image: a path, a nibabel image or a SimpleITK image; a list of them for a model of several channels.

    Raises:
        PipelineError: the image cannot be read or segmented; the message says why and what to do.
    """
    prediction = predict_case(model, image)
    first = image[0] if isinstance(image, Sequence) and not isinstance(image, str) else image
    in_memory = type(first).__module__.startswith("SimpleITK")
    return Segmentation(
        image=as_sitk(prediction.labels, prediction.affine, first)
        if in_memory
        else as_nibabel(prediction.labels, prediction.affine, prediction.header),
        labels=prediction.labels,
        affine=prediction.affine,
        volumes_mm3=prediction.volumes_mm3,
        warnings=prediction.warnings,
        seconds=prediction.seconds,
        uncertainty=prediction.uncertainty,
    )
