"""A run that was interrupted and resumed ends as one that was not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from phantom import make_bundle, run_settings

from pipeline.config.paths import BundlePaths
from pipeline.errors import ConfigError, PipelineError, WriteError
from pipeline.io.tables import read_csv, sha256
from pipeline.training import precision
from pipeline.training.history import EpochRow
from pipeline.training.trainer import read_run, train_bundle

EPOCHS = 4


class Interrupted(KeyboardInterrupt):
    """Stands for a killed process."""


def train(
    bundle: Path,
    dataset: Path,
    *,
    cut_after: int | None = None,
    resume: bool = False,
    **changes: Any,
) -> str:
    """Return the hash of the trained weights; interrupt the run after the epoch `cut_after`."""

    def epoch_done(row: EpochRow) -> None:
        if row.epoch == cut_after:
            raise Interrupted

    run, content = read_run(
        bundle / "configs" / "run.yaml", run_settings(bundle, dataset, **changes)
    )
    train_bundle(run, content, epoch_done, resume=resume)
    return sha256(BundlePaths(bundle).weights)


@pytest.mark.parametrize("dims", [3, 2])
@pytest.mark.slow
def test_a_resumed_run_ends_with_the_same_weights(tmp_path: Path, dataset: Path, dims: int) -> None:
    """Optimizer, schedule, average and all random numbers continue, to the bit."""
    labels = {"background": 0, "bright": 1}
    whole = train(make_bundle(tmp_path / "whole", dims, labels=labels), dataset)
    bundle = make_bundle(tmp_path / "cut", dims, labels=labels)
    with pytest.raises(Interrupted):
        train(bundle, dataset, cut_after=2)
    assert BundlePaths(bundle).checkpoint.is_file()
    torch.rand(7), np.random.rand(7)
    assert train(bundle, dataset, resume=True) == whole
    assert not BundlePaths(bundle).checkpoint.exists()


@pytest.mark.slow
def test_a_resumed_run_knows_what_was_best_and_its_history(tmp_path: Path, dataset: Path) -> None:
    """The best weights and the table of epochs are those of the run that was not interrupted."""
    changes: dict[str, Any] = {
        "splits": "splits.json",
        "validate_every": 1,
        "keep": "best",
        "learning_rate": 0.05,
    }
    labels = {"background": 0, "bright": 1}
    whole = train(make_bundle(tmp_path / "whole", labels=labels), dataset, **changes)
    bundle = make_bundle(tmp_path / "cut", labels=labels)
    with pytest.raises(Interrupted):
        train(bundle, dataset, cut_after=3, **changes)
    assert train(bundle, dataset, resume=True, **changes) == whole
    tables = [read_csv(tmp_path / name / "train" / "history.csv") for name in ("whole", "cut")]
    a, b = (
        [{key: value for key, value in row.items() if not key.endswith("seconds")} for row in table]
        for table in tables
    )
    assert a == b
    assert len(a) == EPOCHS


@pytest.mark.slow
def test_a_resumed_run_keeps_the_precision_that_was_the_faster_one(
    tmp_path: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Times differ from run to run, and the weights would."""
    answers = [True]
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: True)
    monkeypatch.setattr(precision, "emulates_bfloat16", lambda device: False)
    monkeypatch.setattr(precision, "bfloat16_is_faster", lambda net, inputs: answers.pop())
    labels = {"background": 0, "bright": 1}
    named = make_bundle(tmp_path / "named", labels=labels)
    whole = train(named, dataset, precision="bfloat16")
    bundle = make_bundle(tmp_path / "cut", labels=labels)
    with pytest.raises(Interrupted):
        train(bundle, dataset, cut_after=2, precision="auto")
    assert not answers
    assert train(bundle, dataset, resume=True, precision="auto") == whole


def test_an_unfinished_run_is_not_lost_by_mistake(tmp_path: Path, dataset: Path) -> None:
    """It is resumed or discarded only if asked for, and resumed only with equal settings."""
    bundle = make_bundle(tmp_path / "tiny", labels={"background": 0, "bright": 1})
    with pytest.raises(ConfigError, match="there is no unfinished run to resume"):
        train(bundle, dataset, resume=True)
    with pytest.raises(Interrupted):
        train(bundle, dataset, cut_after=1)
    with pytest.raises(
        ConfigError,
        match=r"unfinished run; continue it with --resume, or discard it with --restart",
    ):
        train(bundle, dataset)
    with pytest.raises(ConfigError, match=r"made with other settings \(learning_rate\)"):
        train(bundle, dataset, resume=True, learning_rate=0.02)


@pytest.mark.parametrize("resume", [False, True])
def test_a_bundle_is_trained_by_one_process_at_a_time(
    tmp_path: Path, dataset: Path, resume: bool
) -> None:
    """The second one is refused and changes nothing; the lock of a killed one does not matter."""
    labels = {"background": 0, "bright": 1}
    whole = train(make_bundle(tmp_path / "alone", labels=labels), dataset)
    bundle = make_bundle(tmp_path / "tiny", labels=labels)
    lock = BundlePaths(bundle).training_lock
    lock.parent.mkdir(parents=True)
    lock.touch()  # as a killed run leaves it
    refused = []

    def train_beside(row: EpochRow) -> None:
        before = BundlePaths(bundle).run.read_bytes()
        with pytest.raises(ConfigError, match="another process is training this bundle"):
            train(bundle, dataset, resume=resume, learning_rate=0.02)
        assert BundlePaths(bundle).run.read_bytes() == before
        refused.append(row.epoch)

    run, content = read_run(bundle / "configs" / "run.yaml", run_settings(bundle, dataset))
    train_bundle(run, content, train_beside)
    assert sha256(BundlePaths(bundle).weights) == whole
    assert refused == list(range(1, EPOCHS + 1))
    assert not lock.exists()


def test_a_bundle_that_cannot_be_written_is_said_before_training(
    tmp_path: Path, dataset: Path
) -> None:
    """It is one error with the path, not the system's exception."""
    bundle = make_bundle(tmp_path / "tiny", labels={"background": 0, "bright": 1})
    BundlePaths(bundle).training.write_text("a file in place of the folder")
    with pytest.raises(WriteError, match="train: cannot be written: File exists"):
        train(bundle, dataset)


def test_a_loss_that_is_no_number_stops_the_run(tmp_path: Path, dataset: Path) -> None:
    """The message names the file of the last good weights."""
    bundle = make_bundle(tmp_path / "tiny", labels={"background": 0, "bright": 1})
    before = sha256(BundlePaths(bundle).weights)
    with pytest.raises(
        PipelineError,
        match=r"the loss became nan in epoch \d, expected a finite number: "
        r".*volseg plan.*lower learning_rate",
    ):
        train(bundle, dataset, learning_rate="1.0e+30")
    assert sha256(BundlePaths(bundle).weights) == before
