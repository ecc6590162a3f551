from __future__ import annotations

import gc
import getpass
import os
import pwd
from collections.abc import Iterator

import pytest

from pipeline import processes


@pytest.fixture(autouse=True)
def thawed() -> Iterator[None]:
    """Have all objects collected again, whatever was imported before."""
    gc.unfreeze()
    yield
    gc.unfreeze()


def test_a_user_without_a_name_gets_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under a number that /etc/passwd does not list; a user who has a name keeps it."""

    def unknown(number: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {number}")

    for name in ("LOGNAME", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("USER", "me")
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    processes.ensure_user_name()
    assert os.environ["USER"] == "me"
    monkeypatch.delenv("USER")
    processes.ensure_user_name()
    assert getpass.getuser() == processes.UNKNOWN_USER


def test_nothing_is_collected_while_modules_are_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Afterwards the collector works again, also after an error, and leaves the modules out."""
    monkeypatch.setattr(processes, "SLOW_MODULE", "not imported")
    with pytest.raises(ImportError), processes.importing():
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled()
    assert gc.get_freeze_count() > 0


def test_the_collector_is_left_alone_where_the_slow_modules_are_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So it is where a program has disabled it."""
    monkeypatch.setattr(processes, "SLOW_MODULE", "gc")
    with processes.importing():
        assert gc.isenabled()
    monkeypatch.setattr(processes, "SLOW_MODULE", "not imported")
    gc.disable()
    try:
        with processes.importing():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
    assert gc.get_freeze_count() == 0
