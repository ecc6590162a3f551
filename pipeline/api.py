"""The public Python API: load a bundle, segment images, train and evaluate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.bundle import open_bundle
from pipeline.defaults import DEFAULT_BUNDLE
from pipeline.evaluation import TOLERANCE_MM, Evaluation
from pipeline.evaluation import evaluate as evaluate_cases
from pipeline.inference import Model, predict_case
from pipeline.io import as_nibabel, as_sitk, fold_cases
from pipeline.training import train
from pipeline.types import Affine, Array, LabelMap, PathOrStr

__all__ = ["Segmentation", "evaluate", "load", "segment", "train"]


@dataclass(frozen=True, kw_only=True)
class Segmentation:
    """The result of `segment`.

    Attributes:
        image: the label map, on the input's grid or with the voxel size that `load` was given: a
            SimpleITK image if the input was one, else a nibabel image.
        labels: the same as an array (X, Y, Z) of output values.
        affine: voxel → RAS+ world, mm.
        volumes_mm3: name → volume of each structure and of the spec's sums, mm³.
        warnings: what makes the case doubtful.
        seconds: wall time of each step.
        uncertainty: (X, Y, Z) from 0 to 1, the entropy of the scores, if `load` was asked for it.
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
    """Return a bundle opened for `segment`; open it once and use it for many images.

    Args:
        bundle: a folder, or the name of a shipped bundle; the brain model by default.
        device: auto, cpu, cuda or mps.
        overlap: of neighbouring windows, a fraction; the bundle's own by default.
        runtime: auto, torch or openvino.
        precision: auto, float32, bfloat16 or int8.
        uncertainty: whether the uncertainty of each voxel is computed.
        labels_spacing: voxel size of the label maps, mm; that of each image by default.

    Raises:
        PipelineError: there is no such bundle or device.
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
    """Return the segmentation of one image, with the voxels that `volseg segment` writes.

    Args:
        model: from `load`.
        image: a path, a nibabel image or a SimpleITK image; a list of them, one per channel, for a
            model of several channels.

    Raises:
        PipelineError: the image cannot be read or segmented; the message says why and what to do.
    """
    prediction = predict_case(model, image)
    several = isinstance(image, Sequence) and not isinstance(image, str)
    first = image[0] if several else image
    if type(first).__module__.startswith("SimpleITK"):
        label_image = as_sitk(prediction.labels, prediction.affine, first)
    else:
        label_image = as_nibabel(prediction.labels, prediction.affine, prediction.header)
    return Segmentation(
        image=label_image,
        labels=prediction.labels,
        affine=prediction.affine,
        volumes_mm3=prediction.volumes_mm3,
        warnings=prediction.warnings,
        seconds=prediction.seconds,
        uncertainty=prediction.uncertainty,
    )


def evaluate(
    bundle: PathOrStr | Model,
    dataset: PathOrStr | Sequence[PathOrStr],
    output_dir: PathOrStr,
    *,
    splits: str | None = None,
    fold: int = 0,
    tolerance_mm: float = TOLERANCE_MM,
    overwrite: bool = False,
) -> Evaluation:
    """Segment the labelled cases of a dataset and score them, as `volseg evaluate` does.

    Args:
        bundle: a model from `load`, a bundle's folder, or the name of a shipped bundle.
        dataset: folder of labelled cases, or one of images and one of labels.
        output_dir: folder of the predictions, scores.csv, summary.json, dice.png and worst.png.
        splits: JSON file of folds, in the dataset's folder or elsewhere; None to score all cases.
        fold: number of the fold whose validation cases are scored.
        tolerance_mm: tolerance of surface Dice, mm.
        overwrite: whether cases that are already segmented are segmented again.

    Returns:
        The scores of each case, their summary and the cases that failed.

    Raises:
        PipelineError: the bundle, the dataset or the fold cannot be used, or the folder holds
            results of another model.
    """
    model = bundle if isinstance(bundle, Model) else load(bundle)
    cases = fold_cases(dataset, splits, fold, "val")
    return evaluate_cases(model, cases, output_dir, tolerance_mm=tolerance_mm, overwrite=overwrite)
