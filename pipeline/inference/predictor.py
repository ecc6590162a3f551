"""The prediction of one case, from its files to a label map on their own grid.

`predict_case` does all of it; its two halves are `prepare` (read and preprocess) and
`predict_prepared` (network and inversion). The command line, the Python API and the bundle's Ignite
engine call these functions, so all of them give the same voxels. No state is kept between cases.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from ignite.engine import Engine
from monai.data import MetaTensor, decollate_batch, list_data_collate
from monai.engines import SupervisedEvaluator
from monai.engines.utils import IterationEvents

from pipeline.config import Spec
from pipeline.errors import VolumeError, unwrapped_errors
from pipeline.inference.aggregator import ScoreBlock
from pipeline.inference.case_model import Prediction, PreparedCase
from pipeline.inference.invert import PRED, InvertedLabels
from pipeline.inference.memory_plan import plan_memory
from pipeline.inference.predicted_quality import quality_warning
from pipeline.inference.process_memory import release_freed_memory
from pipeline.inference.quality_checks import quality_warnings
from pipeline.inference.quality_features import QualityCollector
from pipeline.inference.sliding_window import WindowInferer, with_host_fallback
from pipeline.inference.volumes import structure_volumes
from pipeline.io import channel_headers, warnings_of
from pipeline.transforms import IMAGE, SCAN

if TYPE_CHECKING:
    from pipeline.inference.model import Model

# keys of the evaluator's output: the labels before the user's postprocessing, and the time of the
# network
INVERTED, NETWORK_SECONDS = "inverted_labels", "network_seconds"


def predict_case(model: Model, image: Any) -> Prediction:
    """Return the prediction for one case: label map, volumes and warnings.

    Args:
        model: opened bundle.
        image: path, nibabel image or SimpleITK image, or a list of them, one per channel.

    Raises:
        VolumeError: the case needs more memory than `model.max_memory`, or cannot be segmented as
            it is.
        PipelineError: the case cannot be read or segmented; the message says why.
    """
    buffer_bytes = None
    if model.max_memory is not None:
        buffer_bytes = plan_memory(model, channel_headers(image, len(model.spec.channels)))
    return predict_prepared(model, prepare(model, image), buffer_bytes=buffer_bytes)


def prepare(model: Model, image: Any) -> PreparedCase:
    """Return a case after reading and preprocessing.

    It may run in another thread while the network computes another case.

    Args:
        model: opened bundle.
        image: path, nibabel image or SimpleITK image, or a list of them, one per channel.

    Raises:
        PipelineError: the case cannot be read; the message says why.
    """
    started = time.perf_counter()
    with unwrapped_errors():
        case = model.preprocessing.load({IMAGE: image})
        loaded = time.perf_counter()
        _check_channels(case[IMAGE], model.spec)
        case = model.preprocessing.to_network_grid(case)
    seconds = {"read": loaded - started, "preprocess": time.perf_counter() - loaded}
    return PreparedCase(case=case, seconds=seconds)


def predict_prepared(
    model: Model, prepared: PreparedCase, *, buffer_bytes: float | None = None
) -> Prediction:
    """Return the prediction for a preprocessed case: network, inversion, volumes, quality checks.

    Args:
        model: opened bundle.
        prepared: case from `prepare`.
        buffer_bytes: limit of the buffer in which the logits of overlapping windows are
            summed, bytes; None for the inferer's own limit.

    Raises:
        PipelineError: the case cannot be segmented; the message says why.
    """
    started = time.perf_counter()
    image = prepared.case[IMAGE]
    with unwrapped_errors():
        inverted, network = segment_volume(
            model, image, prepared.case.get(SCAN), buffer_bytes=buffer_bytes
        )
    seconds = {"network": network, "invert": time.perf_counter() - started - network}
    return _prediction(model, inverted, image, prepared.seconds | seconds)


def segment_volume(
    model: Model,
    image: MetaTensor,
    scan: MetaTensor | None = None,
    *,
    buffer_bytes: float | None = None,
) -> tuple[InvertedLabels, float]:
    """Return the label map of a preprocessed image, and the seconds that the network took.

    Each block of logits is inverted before the next one is computed, if the inferer is a
    `WindowInferer`; any other inferer computes the logits of the whole image first.

    Args:
        model: opened bundle.
        image: (C, X, Y, Z) image on the network's grid.
        scan: (C, I, J, K) intensities as read, for `spec.refine`; None leaves borders unrefined.
        buffer_bytes: limit of the buffer in which the logits of overlapping windows are
            summed, bytes; None for the inferer's own limit.
    """
    model.network.eval()
    on_device = image.to(model.device)
    timer = _Timer()
    release_freed_memory()  # of reading, preprocessing and the case before this one: 0.2 GB

    def attempt(sums_device: torch.device) -> InvertedLabels:
        wanted = model.keep_quality_features or model.quality is not None
        quality = QualityCollector(image, model.spec) if wanted else None
        if isinstance(model.inferer, WindowInferer):
            blocks = model.inferer.blocks(
                on_device,
                model.network,
                device=sums_device,
                buffer_bytes=buffer_bytes,
                agreement=None if quality is None else quality.mirror,
            )
        else:
            blocks = _one_block(model, on_device)
        return model.inversion.from_blocks(timer.time(blocks), image, scan, quality)

    with torch.no_grad():
        inverted = with_host_fallback(attempt, on_device)
    return inverted, timer.seconds


def _one_block(model: Model, image: MetaTensor) -> Iterator[ScoreBlock]:
    """Yield the logits of the whole image as one block, for inferers that do not yield blocks."""
    logits = model.inferer(image[None], model.network)[0]
    plain = logits.as_tensor() if isinstance(logits, MetaTensor) else logits
    yield ScoreBlock(start=(0, 0, 0), scores=plain.float(), shape=tuple(plain.shape[1:]))


class _Timer:
    """A stopwatch for the time that an iterator takes to compute its items.

    Attributes:
        seconds: total time so far.
    """

    def __init__(self) -> None:
        self.seconds = 0.0

    def time(self, blocks: Iterator[ScoreBlock]) -> Iterator[ScoreBlock]:
        while True:
            started = time.perf_counter()
            block = next(blocks, None)
            self.seconds += time.perf_counter() - started
            if block is None:
                return
            yield block
            del block  # or it would be held while the next one is computed


def _prediction(
    model: Model, inverted: InvertedLabels, image: MetaTensor, seconds: dict[str, float]
) -> Prediction:
    """Return the prediction of a case: its labels with volumes and warnings."""
    spec, labels, affine = model.spec, inverted.labels, inverted.grid.affine
    volumes = structure_volumes(labels, affine, spec, inverted.soft_mm3)
    warnings = [*warnings_of(image.meta), *quality_warnings(labels, affine, volumes, spec)]
    predicted = None
    if model.quality is not None and inverted.quality is not None:
        predicted = model.quality.predict(inverted.quality)
        warnings += filter(None, [quality_warning(predicted)])
    return Prediction(
        labels=labels,
        affine=affine,
        header=inverted.grid.header,
        warnings=tuple(warnings),
        seconds=seconds,
        volumes_mm3=volumes,
        uncertainty=inverted.uncertainty,
        probabilities=inverted.probabilities,
        predicted_dice=predicted,
        quality_features=inverted.quality if model.keep_quality_features else None,
    )


def _check_channels(image: torch.Tensor, spec: Spec) -> None:
    if len(image) != len(spec.channels):
        raise VolumeError(
            f"got {len(image)} image, expected {len(spec.channels)}, one per channel: "
            f"{', '.join(spec.channels)}"
        )


def streaming_iteration(model: Model) -> Callable[[Engine, Mapping[str, Any]], list[Any]]:
    """Return an `iteration_update` for MONAI's `SupervisedEvaluator` that needs less memory.

    MONAI's own iteration holds the logits of the whole volume. This one inverts each block of them
    before the next one is computed (`segment_volume`). It fires the same events, so that handlers
    and postprocessing run as usual. The evaluator needs `decollate=False`, because the output is a
    list of cases already.

    Args:
        model: opened bundle.
    """

    def iteration(engine: Engine, batch: Mapping[str, Any]) -> list[Any]:
        cases = decollate_batch(dict(batch))
        outputs = []
        for case in cases:
            inverted, seconds = segment_volume(model, case[IMAGE], case.get(SCAN))
            outputs.append(
                {
                    IMAGE: case[IMAGE],
                    PRED: inverted,
                    INVERTED: inverted,
                    NETWORK_SECONDS: seconds,
                }
            )
        engine.state.batch, engine.state.output = cases, outputs
        engine.fire_event(IterationEvents.FORWARD_COMPLETED)
        engine.fire_event(IterationEvents.MODEL_COMPLETED)
        output: list[Any] = engine.state.output
        return output

    return iteration


def evaluate_prepared(
    evaluator: SupervisedEvaluator, model: Model, prepared: PreparedCase
) -> Prediction:
    """Return the prediction for a preprocessed case, computed by the bundle's MONAI evaluator.

    The evaluator's handlers and postprocessing run too.

    Args:
        evaluator: evaluator of the bundle's wiring, with `streaming_iteration`.
        model: opened bundle, the same that the evaluator uses.
        prepared: case from `prepare`.

    Raises:
        PipelineError: the case cannot be segmented; the message says why.
    """
    started = time.perf_counter()
    evaluator.data_loader = [list_data_collate([prepared.case])]
    evaluator.state.epoch_length = 1
    try:
        with unwrapped_errors():
            evaluator.run()
        output = _only(evaluator.state.output)
        pred, inverted = output[PRED], output[INVERTED]
        network = output[NETWORK_SECONDS]
        seconds = {"network": network, "invert": time.perf_counter() - started - network}
        # the user's own postprocessing may have changed the labels
        changed = replace(inverted, labels=pred[0].numpy())
        return _prediction(model, changed, output[IMAGE], prepared.seconds | seconds)
    finally:
        evaluator.data_loader, evaluator.state.output, evaluator.state.batch = [], None, None
        # after an error Ignite keeps the generator of the run, and the next run would resume it
        evaluator._internal_run_generator = None


def _only(outputs: Sequence[Any]) -> Any:
    (output,) = outputs
    return output
