"""A bundle in MONAI's form at work: its evaluator, driven case by case."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.engines.utils import IterationEvents
from monai.transforms import Activationsd, AsDiscreted, Spacingd
from numpy.typing import NDArray

from pipeline.bundle.foreign.agreement import (
    Agreement,
    Choice,
    TrialParts,
    failed,
    label_agreement,
    store_decision,
    stored_decision,
    trial_folder,
    trial_items,
)
from pipeline.bundle.foreign.files import ForeignFacts
from pipeline.bundle.foreign.imports import BundleImports
from pipeline.bundle.foreign.labels import checked_labels
from pipeline.bundle.foreign.replacement import Replacement, plan_replacement
from pipeline.bundle.foreign.settings import ForeignSettings
from pipeline.bundle.foreign.wiring import open_parts, without_logs_of_others, without_warnings
from pipeline.errors import ConfigError, VolumeError, describe_error
from pipeline.inference import (
    FLOAT32_BYTES,
    computes_bfloat16,
    has_amx,
    processor_name,
    release_freed_memory,
)
from pipeline.io import Grid
from pipeline.log import LOGGER
from pipeline.types import Array, LabelMap

PRED, KEPT = "pred", "volseg_probabilities"
BYTE = 255
STOCK, AUTO = "stock", "auto"
OPENVINO_FLOAT32 = Choice("openvino")
OPENVINO_BFLOAT16 = Choice("openvino", "bfloat16")
TORCH_FLOAT32 = Choice("torch")
TRIAL_BYTES = 2**31  # of logits that the bundle's own inferer may hold while the runtime is decided
TRIAL_WIDTH = 0.95  # of a window; rounding must not make two windows of one
STOCK_COPIES = 3  # of all logits, which MONAI's inferer, activation and inversion hold at a time


@dataclass(frozen=True, kw_only=True)
class ForeignOutput:
    """What a bundle gives for a case.

    Attributes:
        pred: output of its postprocessing, (C, X, Y, Z).
        seconds: name of each step → its wall time.
        uncertainty: (X, Y, Z) entropy of the class probabilities, 0 to 1, if it was asked for.
        probabilities: (N, X, Y, Z) uint8, 255 for 1, if they were asked for.
    """

    pred: torch.Tensor
    seconds: dict[str, float]
    uncertainty: Array | None = None
    probabilities: NDArray[np.uint8] | None = None


class _Keep:
    """A transform that keeps the probabilities before they become labels."""

    def __call__(self, data: Any) -> Any:
        return {**data, KEPT: data[PRED]}


class ForeignEngine:
    """The opened parts of a bundle, and what replaces a part of them.

    Args:
        facts: what the bundle's files say.
        settings: how it is opened.

    Raises:
        ConfigError: it cannot be opened, or a setting does not apply to it.
    """

    def __init__(self, facts: ForeignFacts, settings: ForeignSettings) -> None:
        self.facts, self.settings = facts, settings
        self.imports = BundleImports(facts.folder)
        self.parts = open_parts(
            facts, self.imports, settings.overrides, settings.device, settings.overlap
        )
        evaluator = self.parts.evaluator
        self._own = (evaluator.inferer, evaluator.network)
        if settings.uncertainty or settings.probabilities:
            self._keep_probabilities()
        chain = self.parts.postprocessing
        self._transforms = () if chain is None else tuple(chain.transforms)
        self._computed_at = 0.0
        evaluator.add_event_handler(IterationEvents.FORWARD_COMPLETED, self._note_time)
        self.spacing = _spacing(self.parts.preprocessing)
        self._replacement: Replacement | None = None
        self.description: dict[str, Any] | None = None
        self._settle_without_case()

    def run(self, item: Mapping[str, Any], grid: Grid) -> ForeignOutput:
        """Return what the bundle gives for a case.

        Args:
            item: of the bundle's dataset.
            grid: of the case's first file.
        """
        return self._run(item, grid, self._replacement)

    def _settle_without_case(self) -> None:
        """Decide what computes, as far as that needs no case."""
        asked = self.settings.runtime
        if asked == STOCK:
            self._settle(Choice(STOCK), None, "asked for")
            return
        planned = plan_replacement(self.parts.evaluator, self._transforms)
        if isinstance(planned, str):
            if asked != AUTO or self.settings.precision == "bfloat16":
                named = "--precision bfloat16" if asked == AUTO else f"--runtime {asked}"
                raise ConfigError(
                    f"{self.facts.folder}: {named} does not apply, {planned}: choose "
                    "--runtime stock and no precision"
                )
            self._settle(Choice(STOCK), None, planned)
            return
        self._planned = planned
        if asked == AUTO:
            found = stored_decision(self.facts, self.settings)
            if found is not None:
                if parent_process() is None:  # workers open the bundle too
                    self._warn_of_bfloat16(found)
                self._settle(found.choice, planned, found.text)

    def follow(self, runtime: str, precision: str) -> None:
        """Compute as an output folder's results were computed.

        Args:
            runtime: `stock`, `torch` or `openvino`.
            precision: `float32` or `bfloat16`.

        Raises:
            ConfigError: this process cannot.
        """
        choice = Choice(runtime, precision)
        if runtime == STOCK:
            self._settle(choice, None, "as the folder's results")
            return
        planned = plan_replacement(self.parts.evaluator, self._transforms)
        if isinstance(planned, str):
            raise ConfigError(f"{self.facts.folder}: --runtime {runtime}: {planned}")
        if precision == "bfloat16" and not computes_bfloat16():
            raise ConfigError(
                f"{self.facts.folder}: the folder's results are computed in bfloat16, which "
                f"{processor_name(self.settings.device)} has not: choose another folder, or "
                "--overwrite"
            )
        self._settle(choice, planned, "as the folder's results")

    def decide(self, item: Mapping[str, Any], grid: Grid, scratch: Path | None = None) -> None:
        """Decide by a case whether volseg's inferer computes the bundle's own labels.

        Parts of the case are computed both ways, so that the bundle's own does not exceed the
        memory. Nothing is decided where they hold no labels. bfloat16 that was asked for may change
        labels, which is logged; everything else has to agree.

        Args:
            item: of the bundle's dataset.
            grid: of the case's first file.
            scratch: folder for temporary files; None for the system's.

        Raises:
            ConfigError: the runtime that was asked for does not agree.
        """
        tried = []
        with trial_folder(scratch) as folder:
            parts = TrialParts(
                trial_items(item, grid, *self._trial_mm(), folder),
                lambda part, part_grid: self._labels(self._run(part, part_grid, None), part_grid),
            )
            wants_bfloat16 = self.settings.precision == "bfloat16"
            for choice in self._choices():
                agreement = self._compare(choice, parts, folder)
                if agreement is None:
                    return
                tried.append(agreement)
                # in float32, another inferer would show, which rounding would hide
                if agreement.good != wants_bfloat16:
                    break
        self._conclude(tried)

    def _choices(self) -> list[Choice]:
        """Return what can compute the network, in the order in which it is tried."""
        asked, precision = self.settings.runtime, self.settings.precision
        if precision == "bfloat16":
            return [OPENVINO_FLOAT32, OPENVINO_BFLOAT16]
        choices = [TORCH_FLOAT32]
        if self.settings.device.type == "cpu":
            choices.insert(0, OPENVINO_FLOAT32)
            if precision == AUTO and has_amx():
                choices.insert(0, OPENVINO_BFLOAT16)
        return [choice for choice in choices if asked in (AUTO, choice.runtime)]

    def _conclude(self, tried: Sequence[Agreement]) -> None:
        """Settle on the last one that was tried, or on the bundle's own inferer."""
        asked, folder = self.settings.runtime, self.facts.folder
        last, reason = tried[-1], "; ".join(agreement.text for agreement in tried)
        if self.settings.precision == "bfloat16":
            self._settle_on_bfloat16(tried, reason)
            return
        if not last.good:
            if asked != AUTO:
                raise ConfigError(
                    f"{folder}: --runtime {asked} does not agree with the bundle's own inferer "
                    f"({reason}): choose --runtime stock"
                )
            LOGGER.warning(
                "%s: computed by its own inferer, because volseg's does not agree (%s)",
                folder,
                reason,
            )
            last = Agreement(Choice(STOCK), good=True, text=reason)
        elif last.choice == TORCH_FLOAT32 and len(tried) > 1:
            LOGGER.warning("%s: computed in torch, not in OpenVINO (%s)", folder, reason)
        self._settle(last.choice, self._planned, reason)
        if asked == AUTO:  # what was asked for is no decision for those who do not ask
            store_decision(
                self.facts, self.settings, Agreement(last.choice, good=True, text=reason)
            )

    def _settle_on_bfloat16(self, tried: Sequence[Agreement], reason: str) -> None:
        """Settle on bfloat16 because it was asked for."""
        folder, last = self.facts.folder, tried[-1]
        if len(tried) == 1 or not last.compared:  # float32 does not agree, or OpenVINO fails
            raise ConfigError(
                f"{folder}: --precision bfloat16 does not apply ({reason}): choose --precision auto"
            )
        self._warn_of_bfloat16(last)
        self._settle(last.choice, self._planned, reason)
        if self.settings.runtime == AUTO:
            store_decision(self.facts, self.settings, last)

    def _warn_of_bfloat16(self, decided: Agreement) -> None:
        """Warn where bfloat16 was asked for, and is not to be had or changes labels."""
        if self.settings.precision != "bfloat16":
            return
        folder = self.facts.folder
        if decided.choice.precision != "bfloat16":
            LOGGER.warning("%s: computed in float32, this processor has no bfloat16", folder)
        elif not decided.good:
            LOGGER.warning(
                "%s: bfloat16, which was asked for, changes labels (%s)", folder, decided.text
            )

    def _compare(self, choice: Choice, parts: TrialParts, folder: Path) -> Agreement | None:
        """Return how far a runtime agrees on a case; None where nothing is found in it."""
        try:
            replacement = self._planned.with_runtime(choice, self.settings.device, folder)
            for part, grid, expected in parts:
                with without_logs_of_others():
                    found = self._labels(self._run(part, grid, replacement), grid)
                # OpenVINO computes in float32 where a processor has nothing else
                computed = choice._replace(precision=replacement.precision)
                agreement = label_agreement(computed, found, expected)
                if agreement is not None:
                    return agreement
        except (VolumeError, MemoryError):
            raise  # the case cannot be segmented at all
        except Exception as error:
            return failed(choice, f"fails: {describe_error(error)}")
        return None

    def _labels(self, output: ForeignOutput, grid: Grid) -> LabelMap:
        """Return the labels in what the bundle gives, as they are written."""
        return checked_labels(output.pred, [grid], self.facts.labels, self.facts.names).labels

    def _trial_mm(self) -> tuple[float, float]:
        """Return length and width of a part that holds two overlapping windows, mm.

        It is 1.5 windows long; less where the bundle's own inferer would hold too many logits.
        """
        spacing = max((mm for mm in self.spacing or () if mm > 0), default=1.0)
        copies = FLOAT32_BYTES * (STOCK_COPIES + 1) * max(self.facts.out_channels, 1)
        side = self._planned.longest_side
        width = TRIAL_WIDTH * side
        length = min(1.5 * side, max(1.125 * side, TRIAL_BYTES / copies / width**2))
        return length * spacing, width * spacing

    def _settle(self, choice: Choice, planned: Replacement | None, reason: str) -> None:
        device = self.settings.device
        replacement = None if choice.runtime == STOCK else planned
        self._replacement = (
            None if replacement is None else replacement.with_runtime(choice, device)
        )
        self.description = {
            **choice._asdict(),
            "inferer": "the bundle's own"
            if replacement is None
            else f"volseg's, {replacement.words}",
            "reason": reason,
            "device": str(device),
        }

    def _run(
        self, item: Mapping[str, Any], grid: Grid, replacement: Replacement | None
    ) -> ForeignOutput:
        evaluator = self.parts.evaluator
        with self.imports.active(), without_warnings():
            begun = time.perf_counter()
            data = self.parts.preprocessing(dict(item))
            prepared = time.perf_counter()
            evaluator.data_loader = [self.parts.collate([data])]
            del data
            release_freed_memory()  # of reading and transforms: 0.2 GB for 26 million voxels
            evaluator.state.epoch_length = 1
            try:
                with torch.no_grad(), self._on(replacement, grid) as inferer:
                    evaluator.run()
                (output,) = evaluator.state.output
            finally:
                evaluator.data_loader, evaluator.state.output, evaluator.state.batch = (
                    [],
                    None,
                    None,
                )
                # after an error Ignite keeps the generator of the run, and the next would resume it
                evaluator._internal_run_generator = None
        network = self._computed_at - prepared
        seconds = {
            "preprocess": prepared - begun,
            "network": network,
            "invert": time.perf_counter() - self._computed_at,
        }
        kept = output.get(KEPT)
        if inferer is not None and inferer.kept is not None:
            uncertainty, probabilities = inferer.kept
        else:
            uncertainty, probabilities = self._measures(kept, output[PRED])
        return ForeignOutput(
            pred=output[PRED],
            seconds=seconds,
            uncertainty=uncertainty if self.settings.uncertainty else None,
            probabilities=probabilities if self.settings.probabilities else None,
        )

    @contextmanager
    def _on(self, replacement: Replacement | None, grid: Grid) -> Iterator[Any]:
        """Have the evaluator use a replacement; None for the bundle's own inferer and network."""
        evaluator, chain = self.parts.evaluator, self.parts.postprocessing
        if replacement is None:
            yield None
            return
        settings = self.settings
        inferer = replacement.inferer(
            grid, uncertainty=settings.uncertainty, probabilities=settings.probabilities
        )
        evaluator.inferer = inferer
        if chain is not None:
            chain.transforms = self._transforms[replacement.replaced :]
        try:
            yield inferer
        finally:
            evaluator.inferer, evaluator.network = self._own
            if chain is not None:
                chain.transforms = self._transforms

    def _note_time(self, engine: Any) -> None:
        self._computed_at = time.perf_counter()

    def _keep_probabilities(self) -> None:
        """Keep the probabilities of each case before they become labels.

        Raises:
            ConfigError: the postprocessing has no step at which they are there.
        """
        chain = self.parts.postprocessing
        transforms = () if chain is None else tuple(chain.transforms)
        soft = False
        for number, step in enumerate(transforms):
            soft = soft or isinstance(step, Activationsd)
            if soft and isinstance(step, AsDiscreted) and chain is not None:
                chain.transforms = (*transforms[:number], _Keep(), *transforms[number:])
                return
        raise ConfigError(
            f"{self.facts.configuration}: --uncertainty and --probabilities need a postprocessing "
            "with Activationsd before AsDiscreted, by which the network's probabilities are known"
        )

    def _measures(
        self, kept: torch.Tensor | None, pred: torch.Tensor
    ) -> tuple[Array | None, NDArray[np.uint8] | None]:
        """Return the entropy and the probabilities, from what `_Keep` kept."""
        if kept is None:
            return None, None
        if kept.shape[1:] != pred.shape[-3:]:
            raise VolumeError(
                "--uncertainty and --probabilities: this bundle makes labels before it leads back "
                "to the grid of the input, where its probabilities are not known"
            )
        values = (kept.as_tensor() if isinstance(kept, MetaTensor) else kept).float().cpu()
        total = values.sum(dim=0)
        exclusive = bool(torch.allclose(total, torch.ones(()), atol=1e-3))
        found = _entropy(values) if exclusive else _binary_entropy(values)
        scaled = (values.clamp(0, 1) * BYTE).round().to(torch.uint8)
        return found.numpy(), scaled.numpy()

    def compute_empty_window(self, channels: int) -> None:
        """Run the network once, on an empty window."""
        roi = getattr(self.parts.evaluator.inferer, "roi_size", None)
        if roi is None:
            return
        sides = [roi] * 3 if isinstance(roi, int) else list(roi)
        window = torch.zeros(1, channels, *sides, device=self.settings.device)
        with torch.no_grad(), self.imports.active():
            network = self._own[1] if self._replacement is None else self._replacement.network
            network(window)

    def output_bytes(self, channels: int, shape: Sequence[int], file_voxels: int) -> int:
        """Return the size of what is held of the network's output at a time, bytes, about.

        Args:
            channels: of the network's output.
            shape: of the case on the network's grid, voxels.
            file_voxels: of the case's first file.
        """
        if self._replacement is not None and self._replacement.streams:
            labels = FLOAT32_BYTES * file_voxels
            return self._replacement.held_bytes(channels, shape) + labels
        return FLOAT32_BYTES * channels * (STOCK_COPIES * prod(shape) + file_voxels)

    def window_count(self, shape: Sequence[int]) -> int:
        """Return how many windows cover a volume of a size on the network's grid."""
        inferer = self.parts.evaluator.inferer
        roi, overlap = getattr(inferer, "roi_size", None), getattr(inferer, "overlap", 0.0)
        if roi is None or not isinstance(overlap, float | int):
            return 1
        sides = [roi] * len(shape) if isinstance(roi, int) else list(roi)
        if len(sides) == len(shape) - 1:  # slices
            sides.append(1)
        count = 1
        for size, side in zip(shape, sides, strict=True):
            step = max(1, int(side * (1 - overlap)))
            count *= max(1, math.ceil((size - side) / step) + 1) if side > 0 else 1
        return count


def _spacing(preprocessing: Any) -> tuple[float, ...] | None:
    """Return the spacing of the network's grid, mm; None where the file's own is kept."""
    for step in getattr(preprocessing, "transforms", ()):
        if isinstance(step, Spacingd):
            pixdim = np.atleast_1d(np.asarray(step.spacing_transform.pixdim, dtype=float))
            return tuple(np.resize(pixdim, 3).tolist())
    return None


def _entropy(probabilities: torch.Tensor) -> torch.Tensor:
    logs = probabilities.clamp_min(1e-12).log()
    return -(probabilities * logs).sum(dim=0) / math.log(max(2, len(probabilities)))


def _binary_entropy(probabilities: torch.Tensor) -> torch.Tensor:
    p = probabilities.clamp(1e-12, 1 - 1e-7)
    return (-(p * p.log2() + (1 - p) * (1 - p).log2())).mean(dim=0)
