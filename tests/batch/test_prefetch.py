from __future__ import annotations

import threading
import time

import pytest

from pipeline.batch.prefetch import prefetch, write_behind


@pytest.mark.parametrize("concurrent", [True, False])
def test_results_come_in_order_and_failures_with_their_item(concurrent: bool) -> None:
    """A function that fails for one item fails there, and the others go on."""

    def half(number: int) -> float:
        if number == 3:
            raise ZeroDivisionError
        return number / 2

    found = []
    for number, later in prefetch(half, range(6), concurrent=concurrent):
        try:
            found.append((number, later.result()))
        except ZeroDivisionError:
            found.append((number, -1.0))
    assert found == [(0, 0.0), (1, 0.5), (2, 1.0), (3, -1.0), (4, 2.0), (5, 2.5)]


def test_the_next_item_is_begun_while_one_is_used() -> None:
    """And no more than that one."""
    begun: list[int] = []
    for number, later in prefetch(begun.append, range(5), concurrent=True):
        later.result()
        for _ in range(200):
            if len(begun) == min(5, number + 2):
                break
            time.sleep(0.01)
        assert begun == list(range(min(5, number + 2)))


def test_nothing_is_begun_early_when_not_beside() -> None:
    """As a memory limit wants it."""
    begun: list[int] = []
    for number, later in prefetch(begun.append, range(5), concurrent=False):
        later.result()
        assert begun == list(range(number + 1))


@pytest.mark.parametrize("concurrent", [True, False])
def test_what_is_done_behind_keeps_its_order(concurrent: bool) -> None:
    """In one other thread, and all of it is done in the end."""
    done: list[int] = []
    threads = set()

    def note(number: int) -> None:
        threads.add(threading.get_ident())
        done.append(number)

    write_behind(note, range(7), concurrent=concurrent)
    assert done == list(range(7))
    assert threads.isdisjoint({threading.get_ident()})


def test_a_failure_behind_is_raised() -> None:
    """Not swallowed by the thread."""
    with pytest.raises(ZeroDivisionError):
        write_behind(lambda number: 1 / number, [1, 0, 1], concurrent=True)  # type: ignore[arg-type]
