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
        ({"epoch": 3}, "unknown key run.epoch; did you mean epochs?"),
    ],
)
def test_a_run_that_cannot_be_is_refused(change: dict[str, Any], says: str) -> None:
    """Each setting is checked on reading, and the message has the path to it."""
    with pytest.raises(ConfigError) as raised:
        parse_config(Run, RUN | change, "run")
    assert says in str(raised.value)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_reads(path: Path) -> None:
    """Each file of configs/ is a run, and names a bundle of the repository."""
    assert (path.parent.parent / load_run(path).bundle / "configs" / "spec.yaml").is_file()


def test_changes_replace_single_settings() -> None:
    """KEY=VALUE reaches any depth, is read as YAML, and leaves the rest alone."""
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
def test_changes_that_cannot_be_are_refused(change: str, says: str) -> None:
    """With the change or the key that is wrong."""
    with pytest.raises(ConfigError) as raised:
        read_run(CONFIGS[0], [change])
    assert says in str(raised.value)


@pytest.mark.parametrize("content", ["", "[1]", "\x00"])
def test_a_file_that_is_no_run_is_refused(tmp_path: Path, content: str) -> None:
    """Also where a change would have to go into nothing."""
    path = tmp_path / "run.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=str(path)):
        read_run(path, ["epochs=5"])
