"""A run's time limit: what counts, what is kept for the end, and what is written before it."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import nibabel as nib
import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from phantom import nifti, parse_spec, save, smooth

from pipeline.config import Run
from pipeline.inference import Model
from pipeline.io import read
from pipeline.networks import UNet
from pipeline.training import validation as validation_module
from pipeline.training.history import EpochRow, History
from pipeline.training.optimisation import (
    AROUND_SECONDS,
    Budget,
    build_optimizer,
    build_schedule,
    weight_average,
)
from pipeline.training.validation import VALIDATION_SECONDS, Validation, mean_dice
from pipeline.types import Case

RUN = Run(bundle="b", dataset="d", epochs=10, batch_size=2, learning_rate=0.1, minutes=10.0)


class Clock:
    """A clock that only its user moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("validation", [0.0, 100.0, 450.0])
@pytest.mark.parametrize("reading", [0.0, 60.0])
def test_the_whole_run_keeps_its_limit(reading: float, validation: float) -> None:
    """Reading, steps of 7 s and the final validation together take at most 10 minutes and a step.

    The learning rate rises and falls to 0 within the time for steps.
    """
    clock = Clock()
    budget = Budget(10.0, now=clock)
    clock.now += reading
    run = replace(RUN, epochs=1000)
    optimiser = build_optimizer(UNet(2, 1, 2, (2, 4)), run)
    rates = build_schedule(optimiser, run, 4, budget)
    seen: list[float] = []

    def step(engine: Engine, batch: int) -> None:
        clock.now += 7
        optimiser.step()
        rates.step()
        seen.append(rates.get_last_lr()[0])

    trainer = Engine(step)
    budget.attach(trainer)
    trainer.add_event_handler(Events.STARTED, lambda: budget.reserve(validation))
    trainer.run(range(4), max_epochs=run.epochs)
    spent = clock.now - 1000 + validation
    assert 600 - 7 <= spent + AROUND_SECONDS <= 600 + 7
    assert max(seen) > 0.9 * RUN.learning_rate, "what was spent before is no part of the schedule"
    assert seen[-1] == pytest.approx(0, abs=0.02 * RUN.learning_rate)


def test_a_resumed_run_has_spent_its_time() -> None:
    clock = Clock()
    budgets = [Budget(10.0, now=clock) for _ in range(2)]
    rates = [
        build_schedule(build_optimizer(UNet(2, 1, 2, (2, 4)), RUN), RUN, 4, budget)
        for budget in budgets
    ]
    budgets[0].start_steps()
    clock.now += 240
    budgets[1].clock_started = clock.now  # of another process
    rates[1].load_state_dict(rates[0].state_dict())
    budgets[1].start_steps()
    assert budgets[1].used() == pytest.approx(240 / (600 - AROUND_SECONDS))
    assert rates[1].lr_lambda(0) == rates[0].lr_lambda(0)


def test_what_came_before_the_clock_counts() -> None:
    """A command that has been importing for a minute has spent it."""
    clock = Clock()
    budget = Budget(10.0, now=clock)
    budget.clock_started = clock.now - 60
    assert budget.spent() == 60
    clock.now += 540
    assert budget.is_over()


def test_a_run_without_a_limit_reserves_nothing() -> None:
    budget = Budget(None)
    budget.reserve(1e9)
    assert budget.used() == 0.0


@pytest.mark.parametrize(("validation", "warned"), [(60.0, False), (560.0, True), (2000.0, True)])
def test_a_limit_that_leaves_no_time_is_named(
    validation: float, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Before the first step, with the minutes that would do."""
    budget = Budget(10.0, now=Clock())
    budget.reserve(validation)
    with caplog.at_level(logging.WARNING, logger="volseg"):
        budget.warn_if_short()
    assert bool(caplog.records) is warned
    if warned:
        needed = float(caplog.text.rpartition("take ")[2].partition(" minutes")[0])
        larger = Budget(needed + 0.1, now=Clock())
        larger.reserve(validation)
        caplog.clear()
        larger.warn_if_short()
        assert not caplog.records


@pytest.fixture
def cases(tmp_path: Path) -> list[Case]:
    made: list[Case] = []
    for i in range(3):
        image = smooth((12, 15, 13), seed=i)
        label = np.where(image > np.median(image), 7, 300).astype(np.int16)
        label[:4] = 99  # what nobody labelled
        paths = [tmp_path / folder / f"case_{i}.nii.gz" for folder in ("images", "labels")]
        save(paths[0], nifti(image))
        save(paths[1], nib.Nifti1Image(label, nifti(image).affine))
        made.append({"case": f"case_{i}", "image": str(paths[0]), "label": str(paths[1])})
    return made


def validation_of(
    tmp_path: Path, cases: list[Case], run: Run, budget: Budget | None = None
) -> Validation:
    from pipeline.inference import LabelInversion, build_inferer
    from pipeline.networks import build_network
    from pipeline.transforms import preprocessing

    spec: Any = parse_spec(3, ignore_label=99)
    model = Model(
        root=tmp_path / "bundle",
        spec=spec,
        preprocessing=preprocessing(spec),
        network=build_network(spec),
        inferer=build_inferer(spec),
        inversion=LabelInversion(spec),
        device=torch.device("cpu"),
    )
    return Validation(model, cases, run, tmp_path / "bundle" / "models" / "best.pt", budget)


def run_one_epoch(*handlers: Any) -> Engine:
    """Run an engine of two steps with handlers attached in this order, as in the wiring."""
    trainer = Engine(lambda engine, batch: [{"loss": torch.tensor(0.5)}])
    trainer.state.metrics = {}
    for handler in handlers:
        handler.attach(trainer)
    trainer.run(range(2), max_epochs=1)
    return trainer


def test_weights_are_written_before_the_final_validation(
    tmp_path: Path, cases: list[Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is killed while it validates has its weights."""
    run = replace(RUN, epochs=2, minutes=None, validate_every=2)
    validation = validation_of(tmp_path, cases, run)
    weights = tmp_path / "bundle" / "models" / "model.pt"
    written: list[bool] = []

    def kill(*arguments: Any) -> dict[str, float]:
        written.append(weights.is_file())
        raise KeyboardInterrupt

    monkeypatch.setattr(validation_module, "mean_dice", kill)
    with pytest.raises(KeyboardInterrupt):
        run_one_epoch(validation)
    assert written == [True]
    state = torch.load(weights, weights_only=True)
    assert state.keys() == validation.model.network.state_dict().keys()


def test_a_run_with_a_limit_reserves_the_time_of_its_final_validation(
    tmp_path: Path, cases: list[Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first step the network is prepared and one case predicted.

    Each validation measures the time again.
    """
    clock = Clock()
    asked: list[int] = []

    def slow(model: Model, cases: list[Case], *rest: Any) -> dict[str, float]:
        asked.append(len(cases))
        clock.now += 5 * len(cases)
        return {"dice": 0.5}

    def prepare(model: Model) -> None:
        clock.now += 7

    monkeypatch.setattr(validation_module, "mean_dice", slow)
    monkeypatch.setattr(validation_module, "prepare_network", prepare)
    monkeypatch.setattr("pipeline.training.validation.time.monotonic", clock)
    budget = Budget(10.0, now=clock)
    reserved: list[float] = []
    validation = validation_of(tmp_path, cases, replace(RUN, validate_every=1), budget)
    trainer = Engine(lambda engine, batch: reserved.append(budget.reserved))
    budget.attach(trainer)
    validation.attach(trainer)
    trainer.state.metrics = {}
    trainer.run(range(2), max_epochs=1)
    assert asked == [1, 3]
    assert reserved[0] == 22.0  # the network is prepared once, not for each of the three cases
    assert trainer.state.metrics[VALIDATION_SECONDS] == 15.0


@pytest.mark.parametrize("keep", ["last", "best"])
def test_a_validation_ends_with_the_time_limit(
    keep: Literal["last", "best"],
    tmp_path: Path,
    cases: list[Case],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Each case takes 5 of 10 minutes here: the score is that of two, and is said to be."""
    clock = Clock()

    def predict(model: Model, image: str) -> SimpleNamespace:
        clock.now += 300
        return SimpleNamespace(labels=np.rint(read(image.replace("images", "labels")).array))

    monkeypatch.setattr(validation_module, "predict_case", predict)
    run = replace(RUN, validate_every=1, keep=keep, splits="s.json")
    validation = validation_of(tmp_path, cases, run, Budget(10.0, now=clock))
    validation.best_dice = 0.5
    shown: list[str] = []
    validation.case_done = lambda number, count, name: shown.append(name)
    trainer = Engine(lambda engine, batch: None)
    trainer.state.metrics = {}
    with caplog.at_level(logging.WARNING, logger="volseg"):
        validation.validate(trainer)
    assert shown == ["case_0", "case_1"]
    assert "after 2 of 3 validation cases" in caplog.text
    assert trainer.state.metrics["dice"] == 1.0
    assert validation.best_dice == 0.5, "a score of other cases is no better one"


def test_each_case_of_a_validation_is_shown(tmp_path: Path, cases: list[Case]) -> None:
    shown: list[tuple[int, int, str]] = []
    validation = validation_of(tmp_path, cases, replace(RUN, minutes=None, validate_every=1))
    validation.case_done = lambda *call: shown.append(call)
    run_one_epoch(validation)
    assert shown == [(1, 3, "case_0"), (2, 3, "case_1"), (3, 3, "case_2")]


def test_ignored_voxels_do_not_count(
    tmp_path: Path, cases: list[Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prediction that is right but for voxels that nobody labelled has a Dice of 1."""

    def predict(model: Model, image: str) -> SimpleNamespace:
        label = np.rint(read(image.replace("images", "labels")).array).astype(int)
        return SimpleNamespace(labels=np.where(label == 99, 7, label))

    monkeypatch.setattr(validation_module, "predict_case", predict)
    validation = validation_of(tmp_path, cases, RUN)
    assert set(mean_dice(validation.model, cases).values()) == {1.0}


def test_the_time_of_a_validation_is_not_that_of_its_epoch(
    tmp_path: Path, cases: list[Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    """History has both, each in a column of its own."""
    clock = Clock()

    def slow(*arguments: Any) -> dict[str, float]:
        clock.now += 40
        return {"dice": 0.25}

    monkeypatch.setattr(validation_module, "mean_dice", slow)
    monkeypatch.setattr("pipeline.training.history.time.monotonic", clock)
    run = replace(RUN, minutes=None, validate_every=1)
    history = History(tmp_path / "train", torch.optim.SGD([torch.zeros(1)], lr=0.1), run)

    class Steps:
        def attach(self, engine: Engine) -> None:
            def work() -> None:
                clock.now += 3

            engine.add_event_handler(Events.ITERATION_STARTED, work)

    run_one_epoch(Steps(), validation_of(tmp_path, cases, run), history)
    (row,) = history.rows
    assert (row.seconds, row.validation_seconds) == (6.0, 40.0)
    assert row.metrics == {"dice": 0.25}
    assert EpochRow.from_columns(row.columns()) == row
    header = (tmp_path / "train" / "history.csv").read_text().splitlines()[0]
    assert "seconds,validation_seconds" in header


def test_rows_of_earlier_releases_are_read() -> None:
    old = {"epoch": 1, "loss": 0.5, "learning_rate": 0.1, "seconds": 9.0, "dice": 0.7}
    row = EpochRow.from_columns(old)
    assert row.validation_seconds == 0.0
    assert row.metrics == {"dice": 0.7}


@pytest.mark.parametrize(("steps", "decay"), [(24, 0.995), (3, 0.9), (2000, 0.99)])
def test_a_short_average_forgets_the_initial_weights(steps: int, decay: float) -> None:
    """The weight of the initial weights in the average is small after few steps too."""
    network = torch.nn.Conv3d(1, 1, 1)
    average = weight_average(network, replace(RUN, ema_decay=decay))
    with torch.no_grad():
        for parameter in average.ema_model.parameters():
            parameter.fill_(1.0)
        for parameter in network.parameters():
            parameter.fill_(0.0)
    trainer = Engine(lambda engine, batch: None)
    average.attach(trainer)
    trainer.run(range(steps), max_epochs=1)
    kept = float(next(average.ema_model.parameters()).detach().flatten()[0])
    expected = np.prod([min(decay, (1 + t) / (10 + t)) for t in range(1, steps + 1)])
    assert kept == pytest.approx(expected, rel=1e-3, abs=1e-7)
    assert kept < 0.2
