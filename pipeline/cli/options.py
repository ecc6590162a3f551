"""What all commands share: the command class with its verbosity, common options, exit statuses."""

from __future__ import annotations

import logging
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import click

from pipeline.errors import InterruptedRunError, PipelineError, RunStoppedError
from pipeline.log import LOGGER

DONE, SOME_FAILED, USAGE = 0, 1, 2  # exit statuses
SIGNAL = 128  # exit status of a process that a signal ended, less the signal's number
OTHER_LOGGERS = ("monai", "ignite", "torch", "nncf", "matplotlib", "pydicom", "highdicom")

DEVICES = click.Choice(["auto", "cpu", "cuda", "mps"])
PRECISIONS = click.Choice(["auto", "float32", "bfloat16", "int8"])
RUNTIMES = click.Choice(["auto", "torch", "openvino", "stock"])


class UsageError(click.ClickException):
    """A PipelineError as the command line shows it: one line on stderr, exit status 2."""

    exit_code = USAGE


@contextmanager
def usage_errors() -> Iterator[None]:
    """Turn errors that the user can fix into messages without a traceback."""
    try:
        yield
    except RunStoppedError as error:
        click.echo(f"Error: {error}", err=True)
        number = error.number if isinstance(error, InterruptedRunError) else None
        sys.exit(SOME_FAILED if number is None else SIGNAL + number)
    except PipelineError as error:
        raise UsageError(str(error)) from error


class _LogHandler(logging.Handler):
    """Writes the records of the logger `volseg` to stderr, one line each."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        click.echo(f"{prefix}{record.getMessage()}", err=True)


def show_log(level: int = logging.WARNING) -> None:
    """Show the logger `volseg` from a level on, and keep the notes of other libraries off stderr.

    Their errors reach the user through ours; the root logger and its handlers stay as they are.
    """
    for handler in list(LOGGER.handlers):
        if isinstance(handler, _LogHandler):
            LOGGER.removeHandler(handler)
    LOGGER.addHandler(_LogHandler())
    LOGGER.setLevel(level)
    for name in OTHER_LOGGERS:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", module=r"monai\.|ignite\.|torch\.|pydicom\.|highdicom\.")


class Command(click.Command):
    """A command with `-v` and `-q`, which set the level of the log."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        texts = {"verbose": "Show what is done, not only warnings.", "quiet": "Show errors only."}
        for name, text in texts.items():
            flags = [f"-{name[0]}", f"--{name}"]
            self.params.append(click.Option(flags, is_flag=True, help=text))

    def invoke(self, ctx: click.Context) -> Any:
        """Set the level of the log, then run the command."""
        verbose, quiet = ctx.params.pop("verbose"), ctx.params.pop("quiet")
        level = logging.ERROR if quiet else logging.INFO if verbose else logging.WARNING
        show_log(level)
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo("Error: interrupted", err=True)
            sys.exit(SIGNAL + signal.SIGINT)


command = partial(click.command, cls=Command)

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def device_option() -> Decorator:
    """Return the option `--device`."""
    return click.option(
        "--device",
        type=DEVICES,
        default="auto",
        show_default=True,
        help="Device that runs the network; auto takes a GPU where there is one.",
    )


def precision_option() -> Decorator:
    """Return the option `--precision`."""
    return click.option(
        "--precision",
        type=PRECISIONS,
        default="auto",
        show_default=True,
        help="Precision of the network's arithmetic.",
    )


def trust_option() -> Decorator:
    """Return the option `--trust`."""
    return click.option(
        "--trust",
        is_flag=True,
        help="Open a bundle although volseg did not write its wiring, which can run any code: "
        "look at it first.",
    )


def set_option() -> Decorator:
    """Return the option `--set`, which changes the configuration of a foreign bundle."""
    return click.option(
        "--set",
        "overrides",
        multiple=True,
        metavar="ID=VALUE",
        callback=lambda context, parameter, texts: _parsed(texts),
        help="Change a bundle of MONAI's form: an id of its configuration and a new value, such as "
        "inferer#overlap=0.25; without a value the key is removed. May be given several times.",
    )


def _parsed(texts: tuple[str, ...]) -> dict[str, Any]:
    if not texts:  # without importing what only foreign bundles need
        return {}
    with usage_errors():
        from pipeline.bundle import parse_overrides

        return parse_overrides(texts)


def json_option(text: str) -> Decorator:
    """Return the option `--json` with a help text."""
    return click.option("--json", "as_json", is_flag=True, help=text)
