"""What drives the network: the parts of MONAI's trainer, and one case through MONAI's evaluator."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor, list_data_collate
from monai.engines import SupervisedEvaluator
from monai.engines.utils import IterationEvents
from monai.transforms import Compose

from pipeline.config import Spec
from pipeline.errors import VolumeError, unwrap
from pipeline.inference.invert import PRED, SOFT_MM3, UNCERTAINTY
from pipeline.inference.quality_checks import quality_warnings
from pipeline.inference.sliding_window import NETWORK_SECONDS
from pipeline.inference.volumes import volumes_mm3, with_sums
from pipeline.transforms import IMAGE
from pipeline.types import Affine, Array, LabelMap, PathOrStr


@dataclass(frozen=True, kw_only=True)
class Model:
    """A bundle opened for inference: all that one case needs, loaded once.

    Attributes:
        root: the bundle's folder.
        spec: what its weights see and say.
        preprocessing: the way in; its first step reads.
        evaluator: MONAI's evaluator over the network, its inferer and the inversion.
        max_memory: bytes that the process may come to hold; None for no limit.
        uncertainty: whether each voxel's uncertainty is wanted.
    """

    root: PathOrStr
    spec: Spec
    preprocessing: Compose
    evaluator: SupervisedEvaluator
    max_memory: int | None = None
    uncertainty: bool = False


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What one case gave.

    Attributes:
        labels: (X, Y, Z) output values on the file's own grid.
        affine: the file's, voxel → RAS+ world, mm.
        header: the file's NIfTI header, empty for other formats.
        warnings: what is doubtful about the case.
        seconds: wall time of each step.
        volumes_mm3: name → volume of each structure and of the spec's sums, mm³.
        uncertainty: (X, Y, Z) from 0 to 1, the entropy of the scores, where it was asked for.
    """

    labels: LabelMap
    affine: Affine
    header: bytes
    warnings: tuple[str, ...]
    seconds: dict[str, float]
    volumes_mm3: dict[str, float]
    uncertainty: Array | None = None


@dataclass(kw_only=True)
class PreparedCase:
    """A case that was read and brought to the network's grid.

    Attributes:
        batch: what MONAI's evaluator takes, of one case; None once the network has taken it.
        seconds: wall time of each step.
    """

    batch: dict[Hashable, Any] | None
    seconds: dict[str, float]


def predict_case(model: Model, image: Any) -> Prediction:
    """One case through the whole path, file to labels; the command line, the bundle and the Python API all come here.

    Args:
        model: an opened bundle.
        image: a path, a nibabel or SimpleITK image, or a list of them, one a channel.

    Raises:
        PipelineError: the case cannot be read or segmented; the message says why.
    """
    return predict_prepared(model, prepare(model, image))


def prepare(model: Model, image: Any) -> PreparedCase:
    """The first half of `predict_case`: reading and preprocessing, which may go on beside another case's second half.

    Raises:
        PipelineError: the case cannot be read; the message says why.
    """
    started = time.perf_counter()
    with _mendable():
        case = model.preprocessing({IMAGE: image}, end=1)
        read = time.perf_counter()
        _check_channels(case[IMAGE], model.spec)
        batch = list_data_collate([model.preprocessing(case, start=1)])
    return PreparedCase(
        batch=batch, seconds={"read": read - started, "preprocess": time.perf_counter() - read}
    )


def predict_prepared(model: Model, prepared: PreparedCase) -> Prediction:
    """The second half of `predict_case`: the network and the inversion.

    Raises:
        PipelineError: the case cannot be segmented; the message says why.
    """
    batch, prepared.batch = prepared.batch, None
    assert batch is not None
    marks = [time.perf_counter()]
    with _mendable():
        pred = _evaluate(model.evaluator, batch, lambda: marks.append(time.perf_counter()))
    started, network, ended = *marks, time.perf_counter()
    if NETWORK_SECONDS in pred.meta:  # blocks were inverted as they came
        network = started + float(pred.meta[NETWORK_SECONDS])
    labels, affine = pred[0].numpy(), np.asarray(pred.affine, dtype=np.float64)
    volumes = with_sums(
        volumes_mm3(labels, affine, model.spec.labels, pred.meta.get(SOFT_MM3)), model.spec.sums
    )
    return Prediction(
        labels=labels,
        affine=affine,
        header=bytes(np.asarray(pred.meta["header"], dtype=np.uint8)),
        warnings=(
            *(line for line in str(pred.meta["warnings"]).splitlines() if line),
            *quality_warnings(labels, affine, volumes, model.spec),
        ),
        seconds=prepared.seconds | {"network": network - started, "invert": ended - network},
        volumes_mm3=volumes,
        uncertainty=np.asarray(pred.meta[UNCERTAINTY]) if UNCERTAINTY in pred.meta else None,
    )


@contextmanager
def _mendable() -> Iterator[None]:
    """Raises the PipelineError behind what MONAI's transforms and engines raise, where there is one."""
    try:
        yield
    except Exception as error:
        known = unwrap(error)
        if known is None:
            raise
        raise known from error


def _check_channels(image: torch.Tensor, spec: Spec) -> None:
    if len(image) != len(spec.channels):
        raise VolumeError(
            f"got {len(image)} image, expected {len(spec.channels)}, one a channel: {', '.join(spec.channels)}"
        )


def _evaluate(
    evaluator: SupervisedEvaluator, batch: Mapping[Hashable, Any], forward_done: Callable[[], None]
) -> MetaTensor:
    """`pred` of one preprocessed case; the evaluator keeps nothing of it."""
    evaluator.data_loader = [batch]
    evaluator.state.epoch_length = 1
    try:
        with evaluator.add_event_handler(IterationEvents.FORWARD_COMPLETED, forward_done):
            evaluator.run()
        pred: MetaTensor = evaluator.state.output[0][PRED]
        return pred
    finally:
        evaluator.data_loader, evaluator.state.output, evaluator.state.batch = [], None, None
        evaluator._internal_run_generator = (
            None  # Ignite keeps that of a run that failed: the next case would not run
        )
