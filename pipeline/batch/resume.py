"""Whether a case is done: these bytes in, these bytes out; the model is the folder's identity."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.batch.outputs import OutputFolder
from pipeline.batch.records import CaseRecord, FileState, state_of
from pipeline.io import printable


def why_again(
    out: OutputFolder, record: CaseRecord, files: Sequence[Path], *, check_hashes: bool
) -> str:
    """Return why a case that has a record is to be done again; empty if it is done.

    Files with the size and the time of modification that the record names are taken as unchanged.
    Of others the hash decides: a file that was copied or touched is the same file.

    Args:
        out: the output folder.
        record: of the case, with the status `done`.
        files: all files that the case consists of now.
        check_hashes: whether all files are hashed.
    """
    if len(files) != len(record.inputs):
        return "it consists of other files"
    for path, state in zip(files, record.inputs, strict=True):
        problem = _difference(path, state, check_hashes=check_hashes)
        if problem and str(path.absolute()) != state.path:
            return f"its input was {printable(state.path)}, and is {printable(path)} now"
        if problem:
            return f"its input {printable(path)} {problem}"
    for state in record.outputs:
        problem = _difference(out.root / state.path, state, check_hashes=check_hashes)
        if problem:
            return f"its output {printable(state.path)} {problem}"
    return ""


def _difference(path: Path, state: FileState, *, check_hashes: bool) -> str:
    """Return how a file differs from what a record says; empty if it does not."""
    try:
        status = path.stat()
        if status.st_size != state.size:
            return f"has changed: {status.st_size} bytes, {state.size} before"
        if status.st_mtime_ns == state.mtime_ns and not check_hashes:
            return ""
        same = state_of(path, state.path).sha256 == state.sha256
    except FileNotFoundError:
        return "is gone"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return "" if same else "has changed: another content of the same size"
