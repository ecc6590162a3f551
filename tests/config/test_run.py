from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from phantom import RUN

from pipeline.config.parser import parse_config
from pipeline.config.run import Run, load_run
from pipeline.errors import ConfigError
from pipeline.training.trainer import read_run

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"learning_rate": "1e-3"}, "expected float, got '1e-3' at run.learning_rate"),
        ({"epochs": 0}, "run.epochs: expected 1 or more, got 0"),
        ({"batch_size": 0}, "run.batch_size: expected 1 or more, got 0"),
        (
            {"patches_per_case": 4, "batch_size": 6},
            "run.batch_size: expected a multiple of patches_per_case (4), got 6",
        ),
        ({"ema_decay": 1.0}, "run.ema_decay: expected 0 ≤ ema_decay < 1, got 1.0"),
        ({"learning_rate": 0}, "run.learning_rate: expected above 0, got 0.0"),
        ({"warmup": 1.5}, "run.warmup: expected a fraction, 0 ≤ warmup ≤ 1, got 1.5"),
        ({"augment": {"rotaton": 3}}, "unknown key run.augment.rotaton; did you mean rotation?"),
        (
            {"augment": {"mirror": ["X"]}},
            "run.augment.mirror: expected directions R, A or S, got X",
        ),
        (
            {"augment": {"noise_chance": 2}},
            "run.augment.noise_chance: expected a probability, 0 to 1, got 2.0",
        ),
        (
            {"augment": {"elastic_chance": 1.5}},
            "run.augment.elastic_chance: expected a probability, 0 to 1, got 1.5",
        ),
        (
            {"augment": {"elastic_grid": 1}},
            "run.augment.elastic_grid: expected 2 points or more, got 1",
        ),
        ({"minutes": 0}, "run.minutes: expected more than 0 or null, got 0.0"),
        ({"accumulate": 0}, "run.accumulate: expected 1 or more, got 0"),
        ({"focal_gamma": -1}, "run.focal_gamma: expected 0 or more, got -1.0"),
        ({"top_k": 0}, "run.top_k: expected a fraction, 0 < top_k ≤ 1, got 0.0"),
        ({"tversky_weights": [0, 0]}, "run.tversky_weights: expected two weights, 0 or more"),
        ({"class_weights": {"a": -1}}, "run.class_weights.a: expected a weight, 0 or more, got"),
        (
            {"class_weights": {"a": 2}, "loss": "border_ce"},
            "run.class_weights: expected none with the loss border_ce, got a",
        ),
        ({"foreground_share": 0}, "run.foreground_share: expected a fraction, 0 < foreground_"),
        ({"cache_gb": -1}, "run.cache_gb: expected GB, 0 or more, or null, got -1.0"),
        ({"freeze_encoder": -1}, "run.freeze_encoder: expected epochs, 0 or more, got -1"),
        ({"encoder_rate": 0}, "run.encoder_rate: expected a factor above 0, got 0.0"),
        ({"freeze_encoder": 2}, "run.start: expected weights to start from with freeze_encoder"),
        ({"grow": True}, "run.start: expected weights to start from with freeze_encoder and grow"),
        ({"balance": 2}, "run.balance: expected 0 ≤ balance ≤ 1, got 2.0"),
        ({"border_sigma_mm": 0}, "run.border_sigma_mm: expected mm above 0, got 0.0"),
        ({"keep": "best"}, "run.keep and run.patience: expected validate_every of 1 or more"),
        ({"patience": 3, "validate_every": 1}, "run.keep and run.patience: expected"),
        (
            {"synthesis": {"table": "t", "t1_chance": 0.9, "sequence_chance": 0.2}},
            "run.synthesis: expected t1_chance + sequence_chance ≤ 1, got 1.1",
        ),
        (
            {"synthesis": {"table": "t", "slices_mm": [5, 3]}},
            "run.synthesis.slices_mm: expected 0 < low ≤ high, mm, got 5.0, 3.0",
        ),
        (
            {"synthesis": {"table": "t", "bias_every": 0}},
            "run.synthesis.bias_every: expected mm above 0, got 0.0",
        ),
        (
            {"synthesis": {"table": "t", "cut": 2}},
            "run.synthesis.cut: expected 0 to 1, got 2.0",
        ),
        ({"epoch": 3}, "unknown key run.epoch; did you mean epochs?"),
    ],
)
def test_an_invalid_run_is_refused(change: dict[str, Any], says: str) -> None:
    """Each value is checked, and the message holds its key."""
    with pytest.raises(ConfigError) as raised:
        parse_config(Run, RUN | change, "run")
    assert says in str(raised.value)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_reads(path: Path) -> None:
    """Each file of configs/ is a run that names a bundle of the repository."""
    assert (path.parent.parent / load_run(path).bundle / "configs" / "spec.yaml").is_file()


def test_changes_replace_single_values() -> None:
    """KEY=VALUE is read as YAML, reaches nested keys, and changes nothing else."""
    before, _ = read_run(CONFIGS[0])
    after, content = read_run(
        CONFIGS[0], ["epochs=5", "augment.rotation=30", "splits=null", "augment.mirror=[A, S]"]
    )
    assert (after.epochs, after.augment.rotation, after.splits, after.augment.mirror) == (
        5,
        30.0,
        None,
        ("A", "S"),
    )
    assert after.learning_rate == before.learning_rate
    assert content["augment"]["rotation"] == 30


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("epochs", "epochs: expected KEY=VALUE, such as epochs=5"),
        ("epochs=many", "expected int, got 'many' at run.epochs"),
        ("epoch=3", "unknown key run.epoch; did you mean epochs?"),
        ("epochs.first=3", "epochs.first=3: run.epochs holds no settings of its own"),
        ("epochs=[", "epochs=[: the value is not YAML"),
    ],
)
def test_invalid_changes_are_refused(change: str, says: str) -> None:
    """The message holds the change or the key that is wrong."""
    with pytest.raises(ConfigError) as raised:
        read_run(CONFIGS[0], [change])
    assert says in str(raised.value)


@pytest.mark.parametrize("content", ["", "[1]", "\x00"])
def test_a_file_that_is_not_a_run_is_refused(tmp_path: Path, content: str) -> None:
    """Also when a change is given."""
    path = tmp_path / "run.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=str(path)):
        read_run(path, ["epochs=5"])
