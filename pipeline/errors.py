"""The exceptions that volseg raises on purpose, and how to find them behind wrappers.

PipelineError            something the user can fix; its text says where, what was found, what was
│                        expected and what to do
├── ConfigError          a spec, a run, a bundle or a command line that is wrong
├── ReadError            a file that cannot be read completely
├── VolumeError          a volume that was read and cannot be segmented as it is
├── GeometryError        grids that do not agree
├── ShapeError           a tensor that does not fit the network (also a ValueError)
├── WriteError           a result that cannot be written
├── OpenVinoError        a network that OpenVINO cannot compute
├── RunStoppedError      a batch that cannot go on: the disk is full, the output folder is gone
└── InterruptedRunError  a RunStoppedError: a signal ended the batch

Any other exception is a bug of volseg.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = [
    "ConfigError",
    "GeometryError",
    "InterruptedRunError",
    "OpenVinoError",
    "PipelineError",
    "ReadError",
    "RunStoppedError",
    "ShapeError",
    "VolumeError",
    "WriteError",
    "describe_error",
    "explicit_causes",
    "find_pipeline_error",
    "unwrapped_errors",
]


class PipelineError(Exception):
    """Something the user can fix."""


class ConfigError(PipelineError):
    """A spec, a run, a bundle or a command line that is wrong."""


class ReadError(PipelineError):
    """A file that cannot be read completely."""


class VolumeError(PipelineError):
    """A volume that was read and cannot be segmented as it is."""


class GeometryError(PipelineError):
    """Grids that do not agree."""


class ShapeError(PipelineError, ValueError):
    """A tensor that does not fit the network."""


class WriteError(PipelineError):
    """A result that cannot be written."""


class OpenVinoError(PipelineError):
    """A network that OpenVINO cannot compute.

    Attributes:
        lasting: whether the same network fails the same way whenever it is tried.
    """

    def __init__(self, message: str, *, lasting: bool = False) -> None:
        super().__init__(message)
        self.lasting = lasting


class RunStoppedError(PipelineError):
    """A batch that cannot go on; what it has done stays done."""


class InterruptedRunError(RunStoppedError):
    """A signal ended a batch.

    Attributes:
        number: of the signal.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number

    def __reduce__(self) -> tuple[type[InterruptedRunError], tuple[str, int]]:
        return type(self), (str(self), self.number)


def find_pipeline_error(error: BaseException) -> PipelineError | None:
    """Return the PipelineError that an exception was raised from, or None.

    MONAI's transforms, engines and configuration parser wrap what happens inside them by
    `raise … from error`. Only such explicit causes are followed: an exception that happens to be
    raised while a PipelineError is handled is a bug of volseg, not a mistake of the user.
    """
    return next(
        (cause for cause in explicit_causes(error) if isinstance(cause, PipelineError)), None
    )


def describe_error(error: BaseException) -> str:
    """Return the message of the PipelineError behind an exception, else its innermost cause."""
    known = find_pipeline_error(error)
    if known is not None:
        return str(known)
    *_, innermost = explicit_causes(error)
    return f"{type(innermost).__name__}: {innermost}"


@contextmanager
def unwrapped_errors() -> Iterator[None]:
    """Raise the PipelineError behind a wrapping exception in its place, where there is one."""
    try:
        yield
    except PipelineError:
        raise
    except Exception as error:
        known = find_pipeline_error(error)
        if known is None:
            raise
        # `from None`: the wrapper's own cause chain leads to `known`, and a chain with a cycle
        # makes whatever walks it (Dask's scheduler, for one) run for ever
        raise known from None


def explicit_causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception and its explicit causes, outermost first."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__
