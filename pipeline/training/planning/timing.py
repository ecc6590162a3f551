"""How long training takes on this machine: the bundle's own trainer is timed for a few steps."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from math import ceil
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from ignite.engine import Engine, Events
from monai.bundle import ConfigParser
from monai.data import CacheDataset, MetaTensor
from monai.transforms import SpatialPad

from pipeline.bundle import WIRING, read_wiring, template
from pipeline.config import TRAINING_PRECISIONS, BundlePaths, Run, Spec, TrainingPrecision
from pipeline.errors import unwrapped_errors
from pipeline.inference import resolve_device
from pipeline.io import write_atomically
from pipeline.training.precision import emulates_bfloat16
from pipeline.transforms import IMAGE, crop_size
from pipeline.types import Case

# the first steps are slower, because torch chooses algorithms and allocates memory
WARM_UP_STEPS, TIMED_STEPS = 2, 3
# no further step is timed after this many seconds in one precision: slow steps vary less
PROBE_SECONDS = 6.0
# a precision is not timed further after a step that takes this many times as long as the slowest
# step of the fastest precision so far
CLEARLY_SLOWER = 3.0
# The convolution that tells whether a precision is emulated: its channels, and voxels per side. It
# takes milliseconds, an emulated training step can take half a minute
TRIED_CHANNELS, TRIED_VOXELS = 16, 24
TRIALS = 3
# the final validation is timed on one case if it takes at most this many windows, and else on one
# window
TIMED_WINDOWS = 8
# prediction of a case: inversion and scores take about this fraction of the network's time
AFTER_NETWORK = 0.3
CASE_SECONDS = 0.1  # what inversion and scores take even of a small case
STARTUP_SECONDS = 8.0  # time of a run before its first case is read and after its last step
# the wiring's handlers that do work in each step; the others write files
STEP_HANDLERS = ["@train::average", "@train::budget", "@train::schedule_handler"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingTimes:
    """Expected wall times of the parts of a training run, seconds.

    Attributes:
        steps: precision → time of one training step, including random crops and augmentation.
        validation: time of one validation, all cases together.
        around: time before the first step and after the last one, such as for reading the cases.
    """

    steps: Mapping[TrainingPrecision, float]
    validation: float
    around: float

    @property
    def precision(self) -> TrainingPrecision:
        """The precision with the fastest step."""
        return min(self.steps, key=lambda name: self.steps[name])

    @property
    def step(self) -> float:
        """Time of one training step in the fastest precision, seconds."""
        return self.steps[self.precision]


def time_training(
    spec: Spec,
    run: Run,
    cases: Sequence[Case],
    *,
    training_cases: int,
    validation_cases: int,
    precisions: Sequence[TrainingPrecision] = (),
) -> TrainingTimes:
    """Return how long the parts of a run take, measured by a few training steps on this machine.

    The steps are those of the trainer that the bundle's wiring builds, in each precision that the
    processor does not emulate. Timing takes seconds: it stops at the first slow step.

    Args:
        spec: the planned spec.
        run: the planned run; its length and precision do not matter.
        cases: a few cases of the dataset.
        training_cases: number of cases that the run trains on.
        validation_cases: number of cases that the run is validated on.
        precisions: precisions to time; empty for all that the processor does not emulate.
    """
    device = resolve_device("auto")
    run = replace(run, epochs=1, minutes=None)
    with TemporaryDirectory() as folder, unwrapped_errors():
        root = Path(folder)
        _write_wiring(root)
        parser = _step_wiring(root, spec, run, device)
        reading, dataset = _time_reading(parser, cases, run)
        steps: dict[TrainingPrecision, list[float]] = {}
        for precision in precisions or usable_precisions(device):
            parser = _step_wiring(root, spec, replace(run, precision=precision), device)
            parser["train::dataset"] = dataset
            steps[precision] = _time_steps(parser, longest=_longest_step(steps.values()))
        preparation, prediction = _time_prediction(parser, cases[0], device)
    return TrainingTimes(
        steps={precision: _typical_step(seconds) for precision, seconds in steps.items()},
        validation=preparation + validation_cases * (reading + prediction),
        around=STARTUP_SECONDS + training_cases * reading,
    )


def usable_precisions(device: torch.device) -> list[TrainingPrecision]:
    """Return the precisions that a device does not emulate.

    What the processor states is asked first; then one small convolution is timed in each precision,
    for processors that torch knows nothing about.
    """
    usable: list[TrainingPrecision] = []
    fastest = float("inf")
    for precision in TRAINING_PRECISIONS:
        if precision == "bfloat16" and emulates_bfloat16(device):
            continue
        seconds = _time_convolution(precision, device)
        if seconds <= CLEARLY_SLOWER * fastest:
            usable.append(precision)
        fastest = min(fastest, seconds)
    return usable


def _time_convolution(precision: TrainingPrecision, device: torch.device) -> float:
    """Return the shortest time of a small convolution, seconds."""
    # constant weights, because drawing random ones would change the caller's random numbers
    convolution = torch.nn.Conv3d(TRIED_CHANNELS, TRIED_CHANNELS, 3, padding=1, device="meta")
    convolution = convolution.to_empty(device=device)
    for parameter in convolution.parameters():
        torch.nn.init.constant_(parameter, 0.01)
    image = torch.ones((1, TRIED_CHANNELS, *(TRIED_VOXELS,) * 3), device=device)
    seconds = []
    for _ in range(TRIALS):
        started = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            result = convolution(image)
        float(result.detach().float().mean())  # the device is done once the value can be read
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def _write_wiring(root: Path) -> None:
    for name in WIRING:
        write_atomically(BundlePaths(root).configs / name, template(name).read_bytes())


def _step_wiring(root: Path, spec: Spec, run: Run, device: torch.device) -> ConfigParser:
    """Return the wiring of a run without the handlers that write files: checkpoint, history, …"""
    parser = read_wiring(root)
    parser["device"] = device
    parser["spec"] = spec
    parser["settings"] = run
    parser["train::handlers"] = STEP_HANDLERS
    return parser


def _time_reading(
    parser: ConfigParser, cases: Sequence[Case], run: Run
) -> tuple[float, CacheDataset]:
    """Return the seconds that reading and preprocessing one case takes, and the cached dataset.

    The dataset has as many items as all timed steps need; cases occur in it several times.
    """
    # CacheDataset reads a case that occurs several times only once
    length = (WARM_UP_STEPS + TIMED_STEPS) * run.cases_per_step
    # ConfigParser does not look into a tuple; in a list, a path that starts with $ or @ would be
    # taken for an expression or a reference
    parser["train::dataset::data"] = tuple(islice(cycle(cases), length))
    parser.get_parsed_content("train::preprocessing")
    started = time.perf_counter()
    dataset: CacheDataset = parser.get_parsed_content("train::dataset")
    return (time.perf_counter() - started) / len(cases), dataset


def _time_steps(parser: ConfigParser, longest: float) -> list[float]:
    """Return the seconds of each training step.

    Timing stops after a step that takes longer than `longest` or `PROBE_SECONDS`, and when all
    steps together have taken that long.
    """
    parser.get_parsed_content("initialize")
    trainer: Engine = parser.get_parsed_content("train::trainer")
    starts: list[float] = []
    seconds: list[float] = []

    def start_step() -> None:
        starts.append(time.perf_counter())

    def end_step(engine: Engine) -> None:
        float(engine.state.output[0]["loss"])  # the step is finished once the loss can be read
        seconds.append(time.perf_counter() - starts[-1])
        enough = len(seconds) > WARM_UP_STEPS and sum(seconds) > PROBE_SECONDS
        if seconds[-1] > longest or enough or seconds[-1] > PROBE_SECONDS:
            engine.terminate()

    trainer.add_event_handler(Events.GET_BATCH_STARTED, start_step)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, end_step)
    trainer.run()
    return seconds


def _longest_step(steps: Iterable[Sequence[float]]) -> float:
    """Return the seconds after which a step is clearly slower than those of other precisions.

    Args:
        steps: seconds of the steps of each precision that was timed before; inf if there is none.
    """
    slowest_steps = [max(seconds) for seconds in steps]
    return CLEARLY_SLOWER * min(slowest_steps) if slowest_steps else float("inf")


def _typical_step(seconds: Sequence[float]) -> float:
    """Return the median time of the steps after the warm-up, or of all if timing ended earlier."""
    return median(seconds[WARM_UP_STEPS:] or seconds)


def _time_prediction(parser: ConfigParser, case: Case, device: torch.device) -> tuple[float, float]:
    """Return the seconds of preparing the network, and of predicting one case that has been read.

    The network is prepared once per validation: the first window of new weights converts it for
    the runtime. If the case has many windows, one of them is timed.
    """
    spec: Spec = parser.get_parsed_content("spec")
    image = parser.get_parsed_content("preprocessing")({IMAGE: case["image"]})[IMAGE]
    network: torch.nn.Module = parser.get_parsed_content("network")
    inferer = parser.get_parsed_content("inferer")
    network.eval()
    windows = _count_windows(image.shape[1:], spec)
    size = crop_size(spec)
    window = SpatialPad(size)(image)[(..., *(slice(0, voxels) for voxels in size))]

    def timed(volume: MetaTensor) -> float:
        # without its meta: MONAI cannot decollate the operations of one image as if they were a
        # batch's
        batch = volume.as_tensor()[None].to(device)
        started = time.perf_counter()
        with torch.inference_mode():
            inferer(batch, network)
        return time.perf_counter() - started

    first, second = timed(window), timed(window)
    seconds = second * windows if windows > TIMED_WINDOWS else timed(image)
    return max(0.0, first - second), seconds * (1 + AFTER_NETWORK) + CASE_SECONDS


def _count_windows(shape: Sequence[int], spec: Spec) -> int:
    """Return how many windows cover a volume of a shape on the network's grid."""
    windows = 1
    for size, voxels in zip(crop_size(spec), shape, strict=True):
        step = max(1, int(size * (1 - spec.overlap))) if size > 1 else 1
        windows *= max(1, ceil((voxels - size) / step) + 1)
    return windows
