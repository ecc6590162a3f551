"""Why a case failed, in words, and the failures that only a batch knows."""

from __future__ import annotations

import torch

from pipeline.errors import (
    PipelineError,
    describe_error,
    explicit_causes,
    find_pipeline_error,
)
from pipeline.io import printable


class CaseTimeoutError(PipelineError):
    """A case took longer than it may."""


class WorkerDiedError(PipelineError):
    """The process that computed a case died."""


def failure_text(error: BaseException) -> str:
    """Return why a case failed, in one message."""
    if find_pipeline_error(error) is not None:
        return printable(describe_error(error))
    *_, cause = explicit_causes(error)
    # torch's CPU allocator raises a plain RuntimeError, known by its text only
    out_of_memory = isinstance(cause, MemoryError | torch.OutOfMemoryError)
    if out_of_memory or "can't allocate memory" in str(cause):
        return f"out of memory ({printable(str(cause))}); free some, or use a larger machine"
    if isinstance(cause, OSError):
        return printable(f"{cause.filename or 'a file'}: {cause.strerror or cause}")
    return printable(f"unexpected {describe_error(error)} (a bug of volseg: please report it)")


def failure_class(error: BaseException) -> str:
    """Return the class of the error behind a failure, such as `ReadError`."""
    *_, cause = explicit_causes(error)
    return type(find_pipeline_error(error) or cause).__name__
