"""The public Python API: load a bundle, segment images, train and evaluate."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.batch import predict_many
from pipeline.bundle import open_bundle
from pipeline.defaults import DEFAULT_BUNDLE
from pipeline.errors import PipelineError
from pipeline.evaluation import TOLERANCE_MM, Evaluation
from pipeline.evaluation import evaluate as evaluate_cases
from pipeline.inference import Model, Prediction, predict_case
from pipeline.io import as_nibabel, as_sitk, fold_cases
from pipeline.training import train
from pipeline.types import Affine, Array, LabelMap, PathOrStr

__all__ = [
    "Segmentation",
    "SegmentedImage",
    "evaluate",
    "load",
    "segment",
    "segment_many",
    "train",
]


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


@dataclass(frozen=True, kw_only=True)
class SegmentedImage:
    """What became of one image of `segment_many`.

    Attributes:
        image: as it was given.
        segmentation: its result; None if it failed.
        error: why it failed; None if it did not.
    """

    image: Any
    segmentation: Segmentation | None = None
    error: PipelineError | None = None


def load(
    bundle: PathOrStr = DEFAULT_BUNDLE,
    *,
    device: str = "auto",
    overlap: float | None = None,
    runtime: str = "auto",
    precision: str = "auto",
    uncertainty: bool = False,
    labels_spacing: float | None = None,
    trust: bool = False,
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
        trust: whether a bundle may run wiring that volseg did not write: such wiring is code.

    Raises:
        PipelineError: there is no such bundle or device, or its wiring needs `trust`.
    """
    return open_bundle(
        bundle,
        device=device,
        overlap=overlap,
        runtime=runtime,
        precision=precision,
        uncertainty=uncertainty,
        labels_spacing=labels_spacing,
        trust=trust,
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
    return _segmentation(predict_case(model, image), image)


def segment_many(model: Model, images: Iterable[Any], *, jobs: int = 1) -> Iterator[SegmentedImage]:
    """Segment many images and yield each result as it comes, failures included.

    An image that cannot be segmented, or that kills the process that works on it, does not end the
    others. With several jobs the order is that in which they are finished. Where worker processes
    are spawned (any system but Linux, or a program with threads), the calling script needs the
    usual `if __name__ == "__main__":`.

    Args:
        model: from `load`.
        images: each is what `segment` takes; they are taken from the iterable as they are needed.
        jobs: number of worker processes; 1 computes in this process.
    """
    given: dict[int, Any] = {}

    def numbered() -> Iterator[Any]:
        for number, image in enumerate(images):
            given[number] = image
            yield image

    for number, result in predict_many(model, numbered(), jobs=jobs):
        image = given.pop(number)
        if isinstance(result, Prediction):
            yield SegmentedImage(image=image, segmentation=_segmentation(result, image))
        else:
            yield SegmentedImage(image=image, error=result)


def _segmentation(prediction: Prediction, image: Any) -> Segmentation:
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
