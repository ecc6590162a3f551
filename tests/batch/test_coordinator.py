from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from batch_folders import record_of

from pipeline.batch import coordinator as module
from pipeline.batch.case_worker import Task
from pipeline.batch.claims import Claims, Death
from pipeline.batch.coordinator import Coordinator
from pipeline.batch.outputs import OutputFolder
from pipeline.batch.records import CaseRecord, read_record, record_time, write_record
from pipeline.batch.runner import Guard
from pipeline.batch.suspects import MAX_DEATHS, MAX_LOST, count_death, read_suspects


@pytest.fixture
def out(tmp_path: Path) -> OutputFolder:
    return OutputFolder.create(tmp_path / "out")


@pytest.fixture
def claims(out: OutputFolder) -> Iterator[Claims]:
    with Claims(out) as claims:
        yield claims


@pytest.fixture
def seen() -> list[CaseRecord]:
    return []


@pytest.fixture
def ours(
    out: OutputFolder, claims: Claims, seen: list[CaseRecord], monkeypatch: pytest.MonkeyPatch
) -> Coordinator:
    monkeypatch.setattr(module, "WAIT_SECONDS", 0.05)
    return Coordinator(out, claims, {"bundle": "tiny"}, seen.append)


def task(name: str, *, alone: bool = False) -> Task:
    return Task(case={"case": name, "image": f"/data/{name}.nii.gz"}, alone=alone)


def stored(out: OutputFolder, name: str) -> CaseRecord:
    record = read_record(out.record(name))
    assert record is not None
    return record


def test_tasks_are_given_out_once_and_those_alone_last(ours: Coordinator) -> None:
    """They remain until their record is there."""
    ours.add([task("x", alone=True), task("a"), task("b")])
    assert ours.remaining == 3
    assert [item.name for item in (ours.take(alone=False), ours.take()) if item] == ["a", "b"]
    assert ours.take(alone=False) is None
    last = ours.take(alone=True)
    assert last is not None
    assert last.name == "x"
    assert (ours.exhausted, ours.remaining) == (True, 3)
    for name in "abx":
        ours.finished(name, record_of(name))
    assert (ours.remaining, ours.counts) == (0, {"done": 3})


def test_a_case_of_another_run_is_waited_for(
    out: OutputFolder, ours: Coordinator, seen: list[CaseRecord]
) -> None:
    """What it has done is not done again; what it gives back is."""
    with Claims(out) as others:
        assert others.take("a") is True
        assert others.take("b") is True
        ours.add([task("a"), task("b"), task("c")])
        names = []

        def finish_later() -> None:
            time.sleep(0.3)
            write_record(out, record_of("a"))
            others.release("a")
            others.release("b")

        thread = threading.Thread(target=finish_later)
        thread.start()
        for item in ours.tasks():
            names.append(item.name)
            write_record(out, record_of(item.name))
            ours.finished(item.name, stored(out, item.name))
        thread.join()
    assert names == ["c", "b"]
    assert ours.counts == {"done": 2, "skipped": 1}
    assert [(record.case, record.status) for record in seen if record.case == "a"] == [
        ("a", "skipped")
    ]


def test_a_waiting_task_that_must_be_alone_stays_alone(
    out: OutputFolder, ours: Coordinator
) -> None:
    """It is not given to a worker that has others, whenever its claim ends."""
    with Claims(out) as others:
        others.take("a")
        ours.add([task("a", alone=True)])
        assert ours.take() is None
        others.release("a")
    time.sleep(0.1)
    assert ours.take(alone=False) is None
    item = ours.take(alone=True)
    assert item is not None
    assert item.alone


def test_a_case_that_was_taken_over_is_left_to_the_other_run(
    out: OutputFolder, ours: Coordinator
) -> None:
    """The worker has dropped it; its result is that of the other run."""
    ours.add([task("a")])
    assert ours.take() is not None
    with Claims(out) as others:
        out.claim("a").unlink()  # the other run has found this one dead
        others.take("a")
        ours.finished("a", None)
        assert (ours.remaining, ours.exhausted) == (1, False)
        time.sleep(0.1)
        assert ours.take() is None
        write_record(out, record_of("a"))
        others.release("a")
        time.sleep(0.1)
        assert ours.take() is None
    assert (ours.remaining, ours.counts) == (0, {"skipped": 1})


def test_a_death_is_retried_alone_and_then_given_up(
    out: OutputFolder, ours: Coordinator, claims: Claims
) -> None:
    """A second one quarantines the case; the case that was in the same process is not blamed."""
    ours.add([task("bad"), task("good")])
    first = [item for item in (ours.take(), ours.take()) if item]
    ours.died(first, "it was killed")
    assert {name: item.deaths for name, item in read_suspects(out).items()} == {
        "bad": 1,
        "good": 1,
    }
    bad, good = ours.take(), ours.take()
    assert bad is not None and good is not None
    assert bad.alone and good.alone
    ours.finished("good", record_of("good"))
    ours.died([bad], "it was killed")
    assert stored(out, "bad").status == "quarantined"
    assert f"died {MAX_DEATHS} times" in stored(out, "bad").error
    assert set(read_suspects(out)) == {"bad"}
    assert ours.counts == {"done": 1, "quarantined": 1}
    assert claims.take("bad") is True


def test_a_death_after_the_record_is_no_death(
    out: OutputFolder, ours: Coordinator, seen: list[CaseRecord]
) -> None:
    """The case was done, although the process could not say so: it is counted once, as done."""
    ours.add([task("a"), task("b")])
    items = [item for item in (ours.take(), ours.take()) if item]
    write_record(out, record_of("a"))
    ours.died(items, "it was killed")
    assert [record.case for record in seen] == ["a"]
    assert set(read_suspects(out)) == {"b"}
    item = ours.take()
    assert item is not None
    write_record(out, record_of("b"))
    ours.timed_out(item, 3)
    assert ours.counts == {"done": 2}


def test_a_record_from_before_the_run_is_no_new_one(out: OutputFolder, ours: Coordinator) -> None:
    """A case that had failed and whose process dies now has died."""
    write_record(out, record_of("a", status="failed"))
    old = Task(case={"case": "a"}, record_time=record_time(out, "a"))
    ours.add([old])
    item = ours.take()
    assert item is not None
    ours.died([item], "it was killed")
    assert read_suspects(out)["a"].deaths == 1


def test_cases_lost_with_whole_runs_are_given_up_late(out: OutputFolder, ours: Coordinator) -> None:
    """Somebody's `kill -9` is no fault of the case; a case that kills each run is one."""
    for number in range(MAX_LOST):
        suspect = count_death(out, "a", "the whole run died", lost=True)
        assert suspect.is_given_up == (number == MAX_LOST - 1)
    ours.give_up(task("a"), suspect)
    assert f"died {MAX_LOST} times" in stored(out, "a").error


def test_a_signal_ends_a_wait_for_other_runs(
    out: OutputFolder, claims: Claims, ours: Coordinator
) -> None:
    """Ctrl-C does not wait until they are done."""
    with Claims(out) as others:
        others.take("a")
        ours.add([task("a")])
        guard = Guard(out, ours, claims)
        threading.Timer(0.3, lambda: guard.on_signal(signal.SIGINT, None)).start()
        begun = time.monotonic()
        assert list(ours.tasks()) == []
        assert time.monotonic() - begun < 5
    assert ours.remaining == 1


def test_a_case_that_another_run_gives_up_is_waited_for(
    out: OutputFolder, ours: Coordinator, claims: Claims, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not forgotten where both find the death at the same moment."""
    for _ in range(MAX_LOST - 1):
        count_death(out, "a", "the whole run died", lost=True)
    answers = iter([Death(by_restart=False), False])
    monkeypatch.setattr(claims, "take", lambda case: next(answers))
    ours.add([task("a")])
    assert ours.take() is None
    assert (ours.remaining, ours.exhausted) == (1, False)


def test_dropped_tasks_can_be_claimed_by_others(out: OutputFolder, ours: Coordinator) -> None:
    """Nothing is given out any more, and what was under way is not claimed any more."""
    ours.add([task("a"), task("b")])
    ours.take()
    ours.drop()
    assert ours.take() is None
    assert ours.remaining == 2
    with Claims(out) as others:
        assert others.take("a") is True
