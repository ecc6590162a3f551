"""One training run: from a run's YAML to a complete bundle, through MONAI's trainer and the bundle's own wiring."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from ignite.engine import Engine, Events
from monai.bundle import ConfigParser

from pipeline.bundle import WIRING, refresh_bundle
from pipeline.config import Run, parse_config, read_yaml
from pipeline.errors import ConfigError, unwrap
from pipeline.io import write_atomically
from pipeline.training.checkpoint import checkpoint_of
from pipeline.training.distributed import barrier, is_first_process, process_group
from pipeline.training.history import History
from pipeline.types import PathOrStr

CHECKPOINT = Path("models") / "checkpoint.pt"
EpochDone = Callable[[dict[str, Any]], None]  # a row of the history


def read_run(path: PathOrStr, changes: Sequence[str] = ()) -> tuple[Run, dict[str, Any]]:
    """A run's YAML with some settings changed: the run, and the content that gives it.

    Args:
        path: the YAML file.
        changes: `key=value`, a dot for each level down (`augment.rotation=30`); values are read as YAML.

    Raises:
        ConfigError: with the path to the key that is wrong.
    """
    content = read_yaml(path, "run")
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected the settings of a run, got {content!r}")
    for change in changes:
        _change(content, change)
    return parse_config(Run, content, "run"), content


def _change(content: dict[str, Any], change: str) -> None:
    key, equals, value = change.partition("=")
    if not equals:
        raise ConfigError(f"{change}: expected KEY=VALUE, such as epochs=5")
    *parents, last = key.split(".")
    level = content
    for i, parent in enumerate(parents):
        level = level.setdefault(parent, {})
        if not isinstance(level, dict):
            raise ConfigError(
                f"{change}: run.{'.'.join(parents[: i + 1])} holds no settings of its own"
            )
    try:
        level[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"{change}: the value is not YAML: {error}") from error


def train_bundle(
    run: Run,
    content: dict[str, Any],
    epoch_done: EpochDone | None = None,
    *,
    resume: bool = False,
    restart: bool = False,
) -> None:
    """Trains the weights of the bundle that a run names, and refreshes all that is generated in it.

    The bundle's folder needs configs/spec.yaml and configs/card.yaml; the run is kept beside them as run.yaml. Started by
    `torchrun` in several processes it is one run: a step then takes the run's batch in each of them.

    Args:
        run: how it goes.
        content: the YAML that gives it.
        epoch_done: called after each epoch with its row of the history.
        resume: go on where a run that was cut off had ended its last whole epoch.
        restart: throw such a run away.

    Raises:
        ConfigError: no spec, a dataset that cannot be used, or an unfinished run and neither `resume` nor `restart`.
    """
    root = Path(run.bundle)
    _check(root, unfinished=resume or restart)
    with process_group() as device:
        if is_first_process():
            write_atomically(
                root / "configs" / "run.yaml", yaml.safe_dump(content, sort_keys=False).encode()
            )
            refresh_bundle(root)
        barrier()
        parser = training_parser(root)
        if device is not None:
            parser["device"] = device
        try:
            _run(parser, epoch_done, resume=resume)
        except Exception as error:
            known = unwrap(error)
            if known is None:
                raise
            raise known from error


def _check(root: Path, *, unfinished: bool) -> None:
    """Nothing, if a run can fill this bundle; `unfinished`: whether it may find one that was cut off."""
    if not (root / "configs" / "spec.yaml").is_file():
        raise ConfigError(
            f"{root}/configs/spec.yaml: no such file; write down there what the weights are to see and to say"
        )
    if not unfinished and (root / CHECKPOINT).is_file():
        raise ConfigError(
            f"{root / CHECKPOINT}: an unfinished run is there; go on with --resume, or throw it away with --restart"
        )


def training_parser(root: Path) -> ConfigParser:
    """The configuration of a bundle that holds all but the weights, read and not yet built."""
    parser = ConfigParser()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MONAI warns at every read that configurations run code
        parser.read_config([root / "configs" / name for name in WIRING])
    parser["bundle_root"] = str(root)
    return parser


def _run(parser: ConfigParser, epoch_done: EpochDone | None, *, resume: bool) -> None:
    parser.get_parsed_content("initialize")
    trainer: Engine = parser.get_parsed_content("train::trainer")
    handlers = parser.get_parsed_content("train::handlers")
    if epoch_done is not None and is_first_process():
        history = next(handler for handler in handlers if isinstance(handler, History))
        trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: epoch_done(history.rows[-1]))
    if resume:
        checkpoint_of(handlers).load(trainer)
    parser.get_parsed_content("run")
    parser.get_parsed_content("finalize")
