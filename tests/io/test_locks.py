"""Locks on files, seen from several processes."""

from __future__ import annotations

import fcntl
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.io import locks
from pipeline.io.locks import locked, locked_once

HOLD = """
import sys
from pathlib import Path
from pipeline.io.locks import {name}
with {name}(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def holder(path: Path, name: str) -> subprocess.Popen[str]:
    """Return a process that holds the lock until its standard input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD.format(name=name), str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.parametrize("name", ["locked", "locked_once"])
def test_one_process_holds_a_lock_until_it_dies(tmp_path: Path, name: str) -> None:
    path = tmp_path / "lock"
    with holder(path, name) as process:
        with pytest.raises(BlockingIOError), locked_once(path):
            pytest.fail("two hold the lock")
        assert path.is_file()
        process.kill()
        process.wait()
        with locked_once(path):
            assert path.is_file()
    assert not path.exists()


def test_a_lock_ends_with_its_block_and_with_an_error(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with pytest.raises(ZeroDivisionError), locked_once(path):
        raise ZeroDivisionError
    assert not path.exists()
    with locked_once(path), pytest.raises(BlockingIOError), locked_once(path):
        pytest.fail("two hold the lock")
    with locked(path), pytest.raises(BlockingIOError), locked_once(path):
        pytest.fail("two hold the lock")


def test_a_file_that_its_holder_removes_meanwhile_is_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock is taken on the file that the next process will find."""
    path = tmp_path / "lock"
    removed: list[Path] = []

    def lock_after_removal(descriptor: int, *, wait: bool) -> None:
        if not removed:
            path.unlink()
            removed.append(path)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

    monkeypatch.setattr(locks, "_lock", lock_after_removal)
    with locked_once(path), open(path, "ab") as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_without_locks_of_the_file_system_nothing_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(descriptor: int, *, wait: bool) -> None:
        raise OSError("Function not implemented")

    monkeypatch.setattr(locks, "_lock", no_locks)
    path = tmp_path / "lock"
    with locked_once(path), locked_once(path), locked(path):
        pass
