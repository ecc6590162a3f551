"""One training run: from its YAML file to a bundle with weights, by MONAI's trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import yaml
from ignite.engine import Engine, Events
from monai.bundle import ConfigParser

from pipeline.bundle import read_wiring, refresh_bundle
from pipeline.config import BundlePaths, Run, parse_config, read_yaml
from pipeline.errors import ConfigError, WriteError, unwrapped_errors
from pipeline.io import locked_once, write_atomically
from pipeline.report import write_training_report
from pipeline.training.checkpoint import CheckpointHandler
from pipeline.training.distributed import barrier, is_first_process, process_group
from pipeline.training.history import EpochRow, History
from pipeline.training.optimisation import Budget
from pipeline.training.validation import CaseDone, Validation
from pipeline.types import PathOrStr

EpochDone = Callable[[EpochRow], None]


def train(
    config: PathOrStr,
    changes: Sequence[str] = (),
    *,
    resume: bool = False,
    restart: bool = False,
    trust: bool = False,
    progress: EpochDone | None = None,
    case_done: CaseDone | None = None,
    started: float | None = None,
) -> Path:
    """Train the bundle that a run's YAML file names.

    Args:
        config: YAML file of the run.
        changes: settings to change, each as `key=value`; see `read_run`.
        resume: whether an interrupted run is continued after its last complete epoch.
        restart: whether an interrupted run is discarded.
        trust: whether wiring of the bundle that volseg did not write may run.
        progress: called after each epoch with its row of the history.
        case_done: called after each case of a validation with its number from 1, the number of
            cases, and its name.
        started: `time.monotonic()` at which the run's time limit begins, such as the start of the
            program; None for now.

    Returns:
        Folder of the bundle.

    Raises:
        ConfigError: the run, the bundle or the dataset cannot be used, or there is an interrupted
            run and neither `resume` nor `restart`, or another process is training the bundle.
        PipelineError: a case cannot be read, or the loss became nan or infinite.
    """
    run, content = read_run(config, changes)
    train_bundle(
        run,
        content,
        progress,
        case_done,
        resume=resume,
        restart=restart,
        trust=trust,
        started=started,
    )
    return Path(run.bundle)


def read_run(path: PathOrStr, changes: Sequence[str] = ()) -> tuple[Run, dict[str, Any]]:
    """Return the run in a YAML file, with some of its settings changed.

    Args:
        path: YAML file of the run.
        changes: settings to change, each as `key=value`, with a dot per level
            (`augment.rotation=30`). Values are YAML.

    Returns:
        The run, and the content of the YAML file with the same changes.

    Raises:
        ConfigError: the file cannot be read, or a setting is unknown or has a wrong value; the
            message has the path of the setting.
    """
    content = read_yaml(path, "run")
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected the settings of a run, got {content!r}")
    for change in changes:
        _apply_change(content, change)
    return parse_config(Run, content, "run"), content


def _apply_change(content: dict[str, Any], change: str) -> None:
    """Apply a change such as `augment.rotation=30` to the content of a YAML file, in place."""
    key, equals, value = change.partition("=")
    if not equals:
        raise ConfigError(f"{change}: expected KEY=VALUE, such as epochs=5")
    *parents, last = key.split(".")
    level = content
    for i, parent in enumerate(parents):
        level = level.setdefault(parent, {})
        if not isinstance(level, dict):
            path = ".".join(parents[: i + 1])
            raise ConfigError(f"{change}: run.{path} holds no settings of its own")
    try:
        level[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"{change}: the value is not YAML: {error}") from error


def train_bundle(
    run: Run,
    content: dict[str, Any],
    epoch_done: EpochDone | None = None,
    case_done: CaseDone | None = None,
    *,
    resume: bool = False,
    restart: bool = False,
    trust: bool = False,
    started: float | None = None,
) -> None:
    """Train the weights of a run's bundle, refresh its generated files and write its report.

    The bundle needs configs/spec.yaml and configs/card.yaml; the run is written to
    configs/run.yaml. In several processes, as `torchrun` starts them, this is a single run; each
    process adds `batch_size` patches to each step.

    Args:
        run: settings of the training run.
        content: content of the YAML file that `run` was parsed from.
        epoch_done: called after each epoch with its row of the history.
        case_done: called after each case of a validation; see `train`.
        resume: whether an interrupted run is continued after its last complete epoch.
        restart: whether an interrupted run is discarded.
        trust: whether wiring of the bundle that volseg did not write may run.
        started: time at which the run's time limit begins; see `train`.

    Raises:
        ConfigError: there is no spec, the dataset cannot be used, there is an interrupted run and
            neither `resume` nor `restart`, another process is training the bundle, or the wiring
            is not volseg's and not trusted.
        PipelineError: a case cannot be read, or the loss became nan or infinite.
    """
    paths = BundlePaths(run.bundle)
    if not paths.spec.is_file():
        raise ConfigError(
            f"{paths.spec}: no such file; write the spec of the weights there, "
            "or let `volseg plan` do it"
        )
    with _only_run(paths), process_group() as device:
        if paths.checkpoint.is_file() and not (resume or restart):
            raise ConfigError(
                f"{paths.checkpoint}: is the checkpoint of an unfinished run; "
                "continue it with --resume, or discard it with --restart"
            )
        if is_first_process():
            write_atomically(paths.run, yaml.safe_dump(content, sort_keys=False).encode())
            refresh_bundle(paths.folder)
        barrier()
        parser = read_wiring(paths.folder, trust=trust)
        if device is not None:
            parser["device"] = device
        with unwrapped_errors():
            if started is not None:
                budget: Budget = parser.get_parsed_content("train::budget")
                budget.clock_started = started
            _run_wiring(parser, epoch_done, case_done, resume=resume)
        if is_first_process():
            write_training_report(paths.folder)


@contextmanager
def _only_run(paths: BundlePaths) -> Iterator[None]:
    """Keep other runs from training the bundle meanwhile: each would overwrite the other's files.

    Raises:
        ConfigError: another run is training the bundle.
        WriteError: the bundle's folder cannot be written.
    """
    if not is_first_process():
        yield
        return
    with ExitStack() as stack:
        try:
            paths.training.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked_once(paths.training_lock))
        except BlockingIOError as error:
            raise ConfigError(
                f"{paths.folder}: another process is training this bundle; wait until it has "
                "ended, or train a copy of the bundle"
            ) from error
        except OSError as error:
            raise WriteError(f"{paths.training}: cannot be written: {error.strerror}") from error
        yield


def _run_wiring(
    parser: ConfigParser,
    epoch_done: EpochDone | None,
    case_done: CaseDone | None,
    *,
    resume: bool,
) -> None:
    """Initialise, run and finalise the trainer of a wiring, as `monai.bundle run` does."""
    parser.get_parsed_content("initialize")
    trainer: Engine = parser.get_parsed_content("train::trainer")
    if epoch_done is not None and is_first_process():
        history: History = parser.get_parsed_content("train::history")
        # added after the wiring's handlers, so that the history has the epoch's row already
        trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: epoch_done(history.rows[-1]))
    if case_done is not None:
        validation: Validation = parser.get_parsed_content("train::validation")
        validation.case_done = case_done
    if resume:
        checkpoint: CheckpointHandler = parser.get_parsed_content("train::checkpoint")
        checkpoint.load(trainer)
    parser.get_parsed_content("run")
    parser.get_parsed_content("finalize")
