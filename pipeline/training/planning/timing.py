"""How long training takes on this machine: a few steps of the wired trainer, timed."""

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

# the first steps are slower: torch chooses algorithms and asks for memory
WARM_UP_STEPS, TIMED_STEPS = 2, 3
# timing of a precision ends at a step that takes this many times the slowest one of the best so far
CLEARLY_SLOWER = 3.0
STARTUP_SECONDS = 8.0  # of a run, before its first case and after its last step
# those of the wiring that take part in a step; the others write files
STEP_HANDLERS = ["@train::average", "@train::budget", "@train::schedule_handler"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingTimes:
    """Seconds that the parts of a run take.

    Attributes:
        steps: precision → one training step, including the drawing of its patches.
        validation: one pass over the validation cases.
        around: what is done once, before and after training.
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
        """One step in that precision."""
        return self.steps[self.precision]


def time_training(
    spec: Spec,
    run: Run,
    cases: Sequence[Case],
    *,
    training_cases: int,
    validation_cases: int,
) -> TrainingTimes:
    """Time the trainer of the wiring on a few cases, in each precision that this machine computes.

    Args:
        spec: of the network.
        run: settings of the training run.
        cases: a sample of those to come.
        training_cases: how many cases the run will train on.
        validation_cases: how many cases the run will be validated on.
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
    """Return the wiring of a run without what it writes: checkpoint, history, validation."""
    parser = read_wiring(root)
    parser["device"] = device
    parser["spec"] = spec
    parser["settings"] = run
    parser["train::handlers"] = STEP_HANDLERS
    return parser


def _time_reading(
    parser: ConfigParser, cases: Sequence[Case], run: Run
) -> tuple[float, CacheDataset]:
    """Return the seconds that one case takes to be read and prepared, and the cached dataset."""
    # the dataset reads each case once, however often it comes up
    length = (WARM_UP_STEPS + TIMED_STEPS) * run.cases_per_step
    # a tuple, because the parser would search a list for references: a path may start with $ or @
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
        float(engine.state.output[0]["loss"])  # waits for a GPU to finish the step
        seconds.append(time.perf_counter() - starts[-1])
        if seconds[-1] > longest:
            engine.terminate()

    trainer.add_event_handler(Events.GET_BATCH_STARTED, start_step)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, end_step)
    trainer.run()
    return seconds


def _longest_step(steps: Iterable[Sequence[float]]) -> float:
    """Return the seconds above which a step is clearly slower than the fastest precision's."""
    slowest_steps = [max(seconds) for seconds in steps]
    return CLEARLY_SLOWER * min(slowest_steps) if slowest_steps else float("inf")


def _typical_step(seconds: Sequence[float]) -> float:
    """Return the median of the steps after the warm-up; of all steps if timing ended before."""
    return median(seconds[WARM_UP_STEPS:] or seconds)


def _time_network(parser: ConfigParser, case: Case, device: torch.device) -> float:
    """Return the seconds that the network takes for the whole image of one case."""
    image = parser.get_parsed_content("preprocessing")({IMAGE: case["image"]})[IMAGE]
    network: torch.nn.Module = parser.get_parsed_content("network")
    inferer = parser.get_parsed_content("inferer")
    network.eval()
    started = time.perf_counter()
    with torch.inference_mode():
        inferer(image[None].to(device), network)
    return time.perf_counter() - started
