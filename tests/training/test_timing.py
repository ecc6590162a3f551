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
from pipeline.io.layouts import find_pairs
from pipeline.training.planning import timing
from pipeline.training.planning.timing import (
    STARTUP_SECONDS,
    TIMED_STEPS,
    WARM_UP_STEPS,
    TrainingTimes,
    time_training,
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
    """A clock that only the network moves, by 1 s in float32 and 2 s in bfloat16."""
    from pipeline.training.precision import TrainingInferer

    fake = _Clock({"float32": 1.0, "bfloat16": 2.0})
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
    assert times.steps == {"float32": 1.0, "bfloat16": 2.0}
    assert times.precision == "float32"


def test_a_clearly_slower_precision_is_timed_for_one_step(
    clock: _Clock, spec: Spec, cases: list[Case]
) -> None:
    clock.seconds["bfloat16"] = 30.0
    times = measure(spec, run_with(), cases)
    assert clock.steps == {"float32": STEPS, "bfloat16": 1}
    assert times.steps == {"float32": 1.0, "bfloat16": 30.0}


def test_emulated_bfloat16_is_not_timed(
    clock: _Clock, spec: Spec, cases: list[Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "emulates_bfloat16", lambda device: True)
    times = measure(spec, run_with(), cases)
    assert clock.steps == {"float32": STEPS}
    assert times.steps == {"float32": 1.0}


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
