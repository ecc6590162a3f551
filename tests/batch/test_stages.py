from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator

import pytest

from pipeline.batch.stages import run_stages


def numbers(count: int) -> Iterator[int]:
    yield from range(count)


@pytest.mark.parametrize("concurrent", [True, False])
@pytest.mark.parametrize("count", [0, 1, 2, 17])
def test_items_pass_all_stages_in_order(count: int, concurrent: bool) -> None:
    """Each once, however long a stage takes."""
    written: list[int] = []

    def read(item: int) -> int:
        time.sleep(0.003 * (item % 3))
        return item * 10

    def compute(item: int) -> int:
        time.sleep(0.003 * (item % 4))
        return item + 1

    run_stages(numbers(count), read, compute, written.append, concurrent=concurrent)
    assert written == [10 * item + 1 for item in range(count)]


@pytest.mark.parametrize("concurrent", [True, False])
def test_the_first_item_is_read_while_the_computation_is_prepared(concurrent: bool) -> None:
    """And no other; without overlap the preparation comes first."""
    events: list[str] = []

    def read(item: int) -> int:
        events.append(f"read {item}")
        return item

    def prepare() -> None:
        time.sleep(0.1)
        events.append("prepared")

    def compute(item: int) -> int:
        events.append(f"compute {item}")
        return item

    run_stages(numbers(3), read, compute, lambda item: None, concurrent=concurrent, prepare=prepare)
    first = ["read 0", "prepared"] if concurrent else ["prepared", "read 0"]
    assert events[:2] == first
    assert events.count("prepared") == 1


def test_a_preparation_that_fails_ends_the_stages() -> None:
    """Also while the first item is still being read."""
    reading = threading.Event()

    def prepare() -> None:
        raise RuntimeError("cannot")

    begun = time.monotonic()
    with pytest.raises(RuntimeError, match="cannot"):
        run_stages(
            numbers(3),
            lambda item: reading.wait(60),
            lambda item: item,
            lambda item: None,
            concurrent=True,
            prepare=prepare,
        )
    assert time.monotonic() - begun < 30
    reading.set()


def test_at_most_one_item_is_read_ahead() -> None:
    """While an item is computed, the next one is read and no other."""
    begun: list[int] = []
    ahead: list[int] = []

    def read(item: int) -> int:
        begun.append(item)
        return item

    def compute(item: int) -> int:
        time.sleep(0.02)
        ahead.append(len(begun) - item)
        return item

    run_stages(numbers(8), read, compute, lambda item: None, concurrent=True)
    assert max(ahead) == 2  # the item itself and the next
    assert min(ahead[:-1]) == 2  # and reading does overlap


def test_stages_do_not_overlap_where_memory_is_limited() -> None:
    """Each item is finished before the next one is taken."""
    events: list[str] = []

    def items() -> Iterator[int]:
        for item in range(3):
            events.append(f"take {item}")
            yield item

    def stage(name: str) -> Callable[[int], int]:
        def step(item: int) -> int:
            events.append(f"{name} {item}")
            return item

        return step

    def write(item: int) -> None:
        stage("write")(item)

    run_stages(items(), stage("read"), stage("compute"), write, concurrent=False)
    assert events == [
        f"{step} {item}" for item in range(3) for step in ("take", "read", "compute", "write")
    ]


FAULTS = [ValueError("x"), SystemExit(3), KeyboardInterrupt(), MemoryError(), GeneratorExit()]


@pytest.mark.parametrize("concurrent", [True, False])
@pytest.mark.parametrize("stage", ["items", "read", "compute", "write"])
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
def test_what_a_stage_raises_comes_out(fault: BaseException, stage: str, concurrent: bool) -> None:
    """From any thread, and what was written before stays written."""
    written: list[int] = []

    def fails(name: str, item: int) -> int:
        if name == stage and item == 2:
            raise fault
        return item

    def items() -> Iterator[int]:
        for item in range(9):
            yield fails("items", item)

    def write(item: int) -> None:
        written.append(fails("write", item))

    with pytest.raises(type(fault)) as raised:
        run_stages(
            items(),
            lambda item: fails("read", item),
            lambda item: fails("compute", item),
            write,
            concurrent=concurrent,
        )
    assert raised.value is fault
    assert written == [0, 1][: len(written)]
    if not concurrent:
        assert written == [0, 1]


def test_a_write_is_finished_when_another_stage_fails() -> None:
    """What is half written when the network fails is written to its end."""
    written: list[str] = []
    begun = threading.Event()

    def write(item: int) -> None:
        begun.set()
        time.sleep(0.3)
        written.append(f"whole {item}")

    def compute(item: int) -> int:
        if item == 1:
            begun.wait()
            raise ValueError("no")
        return item

    with pytest.raises(ValueError, match="no"):
        run_stages(numbers(4), lambda item: item, compute, write, concurrent=True)
    assert written == ["whole 0"]


def test_a_read_that_hangs_does_not_hold_up_an_error() -> None:
    """An interrupted process ends although a network file system does not answer."""
    answer = threading.Event()

    def read(item: int) -> int:
        if item == 1:
            answer.wait(20)
        return item

    def compute(item: int) -> int:
        raise KeyboardInterrupt

    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_stages(numbers(3), read, compute, lambda item: None, concurrent=True)
    assert time.monotonic() - begun < 5
    answer.set()


class Large:
    """Stands for an array."""


def test_no_more_items_are_held_than_stages() -> None:
    """One is read, one computed, one written; nothing is kept while a stage waits for the next."""
    alive: list[weakref.ref[Large]] = []
    counts: list[int] = []
    hold = threading.Event()

    def read(item: int) -> Large:
        if item == 5:
            # all others have been written: nothing may be alive while the next one is waited for
            time.sleep(0.3)
            gc.collect()
            counts.append(sum(reference() is not None for reference in alive))
        large = Large()
        alive.append(weakref.ref(large))
        return large

    run_stages(numbers(6), read, lambda item: item, lambda item: None, concurrent=True)
    hold.set()
    assert counts == [0]
