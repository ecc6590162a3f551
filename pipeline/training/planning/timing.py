"""How long training takes on this machine: the bundle's own trainer is timed for a few steps."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from ignite.engine import Engine, Events
from monai.bundle import ConfigParser
from monai.data import CacheDataset

from pipeline.bundle import WIRING, read_wiring, template
from pipeline.config import TRAINING_PRECISIONS, BundlePaths, Run, Spec, TrainingPrecision
from pipeline.errors import unwrapped_errors
from pipeline.inference import resolve_device
from pipeline.io import write_atomically
from pipeline.training.precision import emulates_bfloat16
from pipeline.transforms import IMAGE
from pipeline.types import Case

# the first steps are slower, because torch chooses algorithms and allocates memory
WARM_UP_STEPS, TIMED_STEPS = 2, 3
# a precision is not timed further after a step that takes this many times as long as the slowest
# step of the fastest precision so far
CLEARLY_SLOWER = 3.0
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
) -> TrainingTimes:
    """Return how long the parts of a run take, measured by a few training steps on this machine.

    The steps are those of the trainer that the bundle's wiring builds, in each precision that the
    processor supports.

    Args:
        spec: the planned spec.
        run: the planned run; its length and precision do not matter.
        cases: a few cases of the dataset.
        training_cases: number of cases that the run trains on.
        validation_cases: number of cases that the run is validated on.
    """
    device = resolve_device("auto")
    run = replace(run, epochs=1, minutes=None)
    with TemporaryDirectory() as folder, unwrapped_errors():
        root = Path(folder)
        _write_wiring(root)
        parser = _step_wiring(root, spec, run, device)
        reading, dataset = _time_reading(parser, cases, run)
        steps: dict[TrainingPrecision, list[float]] = {}
        for precision in TRAINING_PRECISIONS:
            if precision == "bfloat16" and emulates_bfloat16(device):
                continue
            parser = _step_wiring(root, spec, replace(run, precision=precision), device)
            parser["train::dataset"] = dataset
            steps[precision] = _time_steps(parser, longest=_longest_step(steps.values()))
        prediction = reading + _time_network(parser, cases[0], device)
    return TrainingTimes(
        steps={precision: _typical_step(seconds) for precision, seconds in steps.items()},
        validation=validation_cases * prediction,
        around=STARTUP_SECONDS + training_cases * reading,
    )


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
    """Return the seconds of each training step; stop after one that takes longer than `longest`."""
    parser.get_parsed_content("initialize")
    trainer: Engine = parser.get_parsed_content("train::trainer")
    starts: list[float] = []
    seconds: list[float] = []

    def start_step() -> None:
        starts.append(time.perf_counter())

    def end_step(engine: Engine) -> None:
        float(engine.state.output[0]["loss"])  # the step is finished once the loss can be read
        seconds.append(time.perf_counter() - starts[-1])
        if seconds[-1] > longest:
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


def _time_network(parser: ConfigParser, case: Case, device: torch.device) -> float:
    """Return the seconds that inference on the whole image of one case takes, without reading."""
    image = parser.get_parsed_content("preprocessing")({IMAGE: case["image"]})[IMAGE]
    network: torch.nn.Module = parser.get_parsed_content("network")
    inferer = parser.get_parsed_content("inferer")
    network.eval()
    started = time.perf_counter()
    with torch.inference_mode():
        inferer(image[None].to(device), network)
    return time.perf_counter() - started
