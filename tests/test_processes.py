from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from pipeline import processes


@pytest.fixture(autouse=True)
def thawed() -> Iterator[None]:
    """Have all objects collected again, whatever was imported before."""
    gc.unfreeze()
    yield
    gc.unfreeze()


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
