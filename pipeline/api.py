"""The public Python API: load a bundle, segment images, train and evaluate."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

from pipeline.batch import predict_many
from pipeline.bundle import open_for_cases
from pipeline.defaults import DEFAULT_BUNDLE
from pipeline.errors import PipelineError
from pipeline.evaluation import TOLERANCE_MM, Evaluation
from pipeline.evaluation import evaluate as evaluate_cases
from pipeline.inference import CaseModel, Prediction
from pipeline.io import as_nibabel, as_sitk, caret_xml, fold_cases
from pipeline.io import label_table as label_colors
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
        image: label map as an image, on the input's grid, or with the voxel size `labels_spacing`
            of `load`. It is a SimpleITK image if the input was one, else a nibabel image.
        labels: (X, Y, Z) label map as an array; its values are those of the bundle's labels.
        affine: affine of the label map, voxel → RAS+ world, mm.
        volumes_mm3: name of each structure and of each sum in the spec → volume, mm³.
        warnings: reasons to check the case by eye.
        seconds: name of each step → its wall time.
        uncertainty: (X, Y, Z) entropy of the class probabilities, 0 to 1; None unless `load` was
            called with `uncertainty`.
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
    """The result of `segment_many` for one image.

    Attributes:
        image: the image, as it was passed.
        segmentation: result of the image; None if it failed.
        error: reason why the image failed; None if it did not.
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
    overrides: Mapping[str, Any] | None = None,
) -> CaseModel:
    """Return a model for `segment`: a bundle, opened for inference.

    Opening takes seconds; open a bundle once and use the model for many images.

    Args:
        bundle: folder of a bundle, or name of a shipped bundle; by default the brain model.
        device: device that the network runs on: `auto`, `cpu`, `cuda` or `mps`.
        overlap: overlap of neighbouring windows, as a fraction of a window; None takes the
            bundle's.
        runtime: library that computes the network: `auto`, `torch` or `openvino`; `stock` is
            the own inferer of a bundle of MONAI's form.
        precision: number format of the network: `auto`, `float32`, `bfloat16` or `int8`.
        uncertainty: whether the uncertainty of each voxel is computed.
        labels_spacing: voxel size of the label maps, mm; None gives each the grid of its image.
        trust: whether a bundle may run wiring that volseg did not write: such wiring is code.
        overrides: id → value in the configuration of a bundle of MONAI's form, such as
            `{"inferer#overlap": 0.25}`.

    Raises:
        PipelineError: there is no such bundle or device, or its wiring needs `trust`.
    """
    return open_for_cases(
        bundle,
        device=device,
        overlap=overlap,
        runtime=runtime,
        precision=precision,
        uncertainty=uncertainty,
        labels_spacing=labels_spacing,
        trust=trust,
        overrides={key.replace("#", "::"): value for key, value in (overrides or {}).items()},
    )


def segment(model: CaseModel, image: Any, *, label_table: bool = True) -> Segmentation:
    """Segment one image in Python.

    The label map equals, voxel for voxel, the one that `volseg segment` writes.

    Args:
        model: model from `load`.
        image: path, nibabel image or SimpleITK image; for a model with several channels, a list of
            them, one per channel.
        label_table: whether the label map, if it is a nibabel image, holds the names and colours of
            its labels, as an extension of its header.

    Returns:
        The label map, as an image and as an array, with volumes, warnings and times.

    Raises:
        PipelineError: the image cannot be read or segmented; the message says why and what to do.
    """
    return _segmentation(model.predict_case(image), image, _label_xml(model, wanted=label_table))


def segment_many(
    model: CaseModel, images: Iterable[Any], *, jobs: int = 1, label_table: bool = True
) -> Iterator[SegmentedImage]:
    """Segment many images, and yield a result for each, including those that fail.

    An image that cannot be segmented, or that kills its worker process, does not stop the others.
    With several jobs, results are in the order in which they are finished. Where worker processes
    are spawned (on any system but Linux, or in a program with threads), the calling script needs
    the usual `if __name__ == "__main__":`.

    Args:
        model: model from `load`.
        images: images as `segment` takes them; an iterator is advanced only as results are needed.
        jobs: number of worker processes; with 1, images are segmented in this process.
        label_table: see `segment`.
    """
    given: dict[int, Any] = {}
    label_xml = _label_xml(model, wanted=label_table)

    def numbered() -> Iterator[Any]:
        for number, image in enumerate(images):
            given[number] = image
            yield image

    for number, result in predict_many(model, numbered(), jobs=jobs):
        image = given.pop(number)
        if isinstance(result, Prediction):
            segmentation = _segmentation(result, image, label_xml)
            yield SegmentedImage(image=image, segmentation=segmentation)
        else:
            yield SegmentedImage(image=image, error=result)


def _label_xml(model: CaseModel, *, wanted: bool) -> bytes:
    return caret_xml(label_colors(model.labels)) if wanted else b""


def _segmentation(prediction: Prediction, image: Any, label_xml: bytes) -> Segmentation:
    several = isinstance(image, Sequence) and not isinstance(image, str)
    first = image[0] if several else image
    if type(first).__module__.startswith("SimpleITK"):
        label_image = as_sitk(prediction.labels, prediction.affine, first)
    else:
        label_image = as_nibabel(prediction.labels, prediction.affine, prediction.header, label_xml)
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
    bundle: PathOrStr | CaseModel,
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
        bundle: model from `load`, folder of a bundle, or name of a shipped bundle.
        dataset: folder of labelled cases, or a folder of images and a folder of labels.
        output_dir: folder of the predictions, scores.csv, summary.json, dice.png and worst.png;
            created if it does not exist.
        splits: JSON file of folds, in the dataset's folder or elsewhere; None scores all cases.
        fold: number of the fold whose held-out cases are scored, from 0.
        tolerance_mm: tolerance of the surface Dice (`nsd`), mm.
        overwrite: whether cases that are already segmented are segmented again.

    Returns:
        The scores of each case, their summary and the cases that failed.

    Raises:
        PipelineError: the bundle, the dataset or the fold cannot be used, or the folder holds
            results of another model.
    """
    model = open_for_cases(bundle) if isinstance(bundle, str | PathLike) else bundle
    cases = fold_cases(dataset, splits, fold, "val")
    return evaluate_cases(model, cases, output_dir, tolerance_mm=tolerance_mm, overwrite=overwrite)
