"""Timing the steps of the wired trainer."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from phantom import RUN, parse_spec

from pipeline.config.parser import parse_config
from pipeline.config.run import Run
from pipeline.config.spec import Spec
from pipeline.inference.sliding_window import WindowInferer
from pipeline.io.layouts import find_pairs
from pipeline.training.planning import timing
from pipeline.training.planning.timing import (
    AFTER_NETWORK,
    CASE_SECONDS,
    PROBE_SECONDS,
    STARTUP_SECONDS,
    TIMED_STEPS,
    WARM_UP_STEPS,
    TrainingTimes,
    time_training,
    usable_precisions,
)
from pipeline.types import Case

STEPS = WARM_UP_STEPS + TIMED_STEPS


@pytest.fixture
def cases(dataset: Path) -> list[Case]:
    return find_pairs([dataset]).cases


@pytest.fixture
def spec() -> Spec:
    tiny: Spec = parse_spec(3, labels={"background": 0, "bright": 1})
    return tiny


def run_with(**changes: Any) -> Run:
    return parse_config(Run, RUN | changes, "run")


class _Clock:
    """Counts the training steps in each precision, and makes those in bfloat16 slow."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds = seconds
        self.now = 0.0
        self.steps: dict[str, int] = {}

    def __call__(self) -> float:
        return self.now

    def step(self, bfloat16: bool) -> None:
        precision = "bfloat16" if bfloat16 else "float32"
        self.steps[precision] = self.steps.get(precision, 0) + 1
        self.now += self.seconds[precision]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> _Clock:
    """A clock that only the network moves, by 0.5 s in float32 and 1 s in bfloat16."""
    from pipeline.training.precision import TrainingInferer

    fake = _Clock({"float32": 0.5, "bfloat16": 1.0})
    real = TrainingInferer.__call__

    def call(self: TrainingInferer, *args: Any, **kwargs: Any) -> Any:
        fake.step(self.bfloat16)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(TrainingInferer, "__call__", call)
    monkeypatch.setattr("pipeline.training.planning.timing.time.perf_counter", fake)
    monkeypatch.setattr(timing, "emulates_bfloat16", lambda device: False)
    monkeypatch.setattr("pipeline.training.precision.emulates_bfloat16", lambda device: False)
    return fake


def measure(spec: Spec, run: Run, cases: list[Case]) -> TrainingTimes:
    return time_training(spec, run, cases, training_cases=10, validation_cases=3)


@pytest.mark.parametrize("many_windows", [False, True])
def test_a_validation_prepares_the_network_once(
    many_windows: bool,
    clock: _Clock,
    spec: Spec,
    cases: list[Case],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first window of new weights takes 40 s longer here, because it converts the network."""
    calls: list[int] = []

    def call(self: WindowInferer, *args: Any, **kwargs: Any) -> None:
        clock.now += 2 if calls else 42
        calls.append(1)

    monkeypatch.setattr(WindowInferer, "__call__", call)
    monkeypatch.setattr(timing, "TIMED_WINDOWS", 0 if many_windows else 1_000)
    monkeypatch.setattr(timing, "_count_windows", lambda shape, spec: 5)
    times = measure(spec, run_with(), cases)
    per_case = (1 + AFTER_NETWORK) * 2 * (5 if many_windows else 1) + CASE_SECONDS
    assert times.validation == pytest.approx(40 + 3 * per_case, abs=0.1)


@pytest.mark.parametrize("dims", [2, 3])
def test_all_parts_of_a_run_take_time(dims: int, cases: list[Case]) -> None:
    """Also with more cases per step than there are in the sample."""
    spec = parse_spec(dims, labels={"background": 0, "bright": 1})
    random_state = torch.get_rng_state()
    times = measure(spec, run_with(batch_size=6, patches_per_case=1), cases)
    torch.set_rng_state(random_state)
    assert times.step > 0
    assert times.precision in times.steps
    assert times.validation > 0
    assert times.around > STARTUP_SECONDS


def test_each_precision_is_timed_by_the_steps_after_the_warm_up(
    clock: _Clock, spec: Spec, cases: list[Case]
) -> None:
    times = measure(spec, run_with(), cases)
    assert clock.steps == {"float32": STEPS, "bfloat16": STEPS}
    assert times.steps == {"float32": 0.5, "bfloat16": 1.0}
    assert times.precision == "float32"


def test_a_clearly_slower_precision_is_timed_for_one_step(
    clock: _Clock, spec: Spec, cases: list[Case]
) -> None:
    clock.seconds["bfloat16"] = 30.0
    times = measure(spec, run_with(), cases)
    assert clock.steps == {"float32": STEPS, "bfloat16": 1}
    assert times.steps == {"float32": 0.5, "bfloat16": 30.0}


def test_emulated_bfloat16_is_not_timed(
    clock: _Clock, spec: Spec, cases: list[Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "emulates_bfloat16", lambda device: True)
    times = measure(spec, run_with(), cases)
    assert clock.steps == {"float32": STEPS}
    assert times.steps == {"float32": 0.5}


def test_slow_steps_end_the_timing(clock: _Clock, spec: Spec, cases: list[Case]) -> None:
    """A step that takes long is timed once; of medium ones, fewer are timed."""
    clock.seconds.update(float32=PROBE_SECONDS + 1, bfloat16=PROBE_SECONDS / 2.5)
    times = measure(spec, run_with(), cases)
    assert clock.steps == {"float32": 1, "bfloat16": WARM_UP_STEPS + 1}
    assert times.precision == "bfloat16"


def test_only_the_precisions_asked_for_are_timed(
    clock: _Clock, spec: Spec, cases: list[Case]
) -> None:
    times = time_training(
        spec, run_with(), cases, training_cases=4, validation_cases=2, precisions=["bfloat16"]
    )
    assert set(times.steps) == set(clock.steps) == {"bfloat16"}


def test_an_emulated_precision_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither where the processor says so, nor where one convolution is clearly slower."""
    monkeypatch.setattr(timing, "emulates_bfloat16", lambda device: False)
    seconds = {"float32": 0.01, "bfloat16": 0.02}
    monkeypatch.setattr(timing, "_time_convolution", lambda name, device: seconds[name])
    cpu = torch.device("cpu")
    assert usable_precisions(cpu) == ["float32", "bfloat16"]
    seconds["bfloat16"] = 0.2
    assert usable_precisions(cpu) == ["float32"]
    seconds["bfloat16"] = 0.005
    monkeypatch.setattr(timing, "emulates_bfloat16", lambda device: True)
    assert usable_precisions(cpu) == ["float32"]


def test_one_convolution_is_timed_without_drawing_random_numbers() -> None:
    state = torch.get_rng_state()
    assert timing._time_convolution("float32", torch.device("cpu")) > 0
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("shape", "windows"),
    [((16, 20, 12), 1), ((17, 20, 12), 2), ((40, 20, 30), 4 * 4), ((8, 8, 8), 1)],
)
def test_the_windows_of_a_volume_are_counted(
    shape: tuple[int, ...], windows: int, spec: Spec
) -> None:
    """With half a window between neighbours: 1 + ceil(24 / 8) and 1 + ceil(18 / 6)."""
    assert timing._count_windows(shape, spec) == windows


def test_large_volumes_are_timed_by_one_window(
    spec: Spec, cases: list[Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "TIMED_WINDOWS", 1)
    few = measure(spec, run_with(), cases)
    assert few.validation > 0


def test_paths_that_look_like_references_are_only_paths(
    spec: Spec, cases: list[Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wiring's parser takes strings that start with @, $ or % for its own."""
    monkeypatch.chdir(tmp_path)
    odd = []
    for prefix, case in zip("@$%", cases, strict=False):
        image, label = (f"{prefix}{case['case']}_{key}.nii.gz" for key in ("image", "label"))
        shutil.copyfile(case["image"], image)  # type: ignore[arg-type]
        shutil.copyfile(case["label"], label)
        odd.append(Case(case=case["case"], image=image, label=label))
    assert measure(spec, run_with(), odd).step > 0
