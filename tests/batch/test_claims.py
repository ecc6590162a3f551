from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.batch import claims as module
from pipeline.batch.claims import (
    LEASE_SECONDS,
    OLD_TEMPORARY_SECONDS,
    Claims,
    Death,
    Holder,
    claims_of_run,
    holds_claim,
)
from pipeline.batch.outputs import OutputFolder
from pipeline.errors import ConfigError, RunStoppedError
from pipeline.io.writer import TEMPORARY_SUFFIX, host_code


@pytest.fixture
def out(tmp_path: Path) -> OutputFolder:
    return OutputFolder.create(tmp_path / "out")


@pytest.fixture
def ours(out: OutputFolder) -> Iterator[Claims]:
    with Claims(out) as claims:
        yield claims


def another_run(out: OutputFolder, case: str | None, age: float = 0, **changes: Any) -> Holder:
    """Leave the file of another run, and its claim of a case, with a heartbeat of some age."""
    holder = replace(Holder.this_process(), **changes)
    path = out.runs / f"{holder.run}.json"
    path.write_text(json.dumps(asdict(holder)))
    if case is not None:
        out.claim(case).parent.mkdir(parents=True, exist_ok=True)
        os.link(path, out.claim(case))
    os.utime(path, (time.time() - age, time.time() - age))
    return holder


def dead_process() -> int:
    """Return the number of a process that is gone."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_claim_is_for_one_run_and_ends_with_the_case(out: OutputFolder) -> None:
    """Another run gets it when it is released, and not before."""
    with Claims(out) as first, Claims(out) as second:
        assert first.take("a") is True
        assert second.take("a") is False
        assert holds_claim(out, first.holder.run, "a")
        assert not holds_claim(out, second.holder.run, "a")
        assert second.take("b") is True
        first.release("a")
        assert second.take("a") is True
    assert not list(out.runs.iterdir())


def test_the_claim_of_a_living_process_holds_however_old(out: OutputFolder, ours: Claims) -> None:
    """On the same machine the process counts, not its heartbeat."""
    another_run(out, "a", age=10 * LEASE_SECONDS)
    assert ours.take("a") is False


DEAD: dict[str, tuple[dict[str, Any], bool]] = {
    "process is gone": ({"pid": -1}, False),
    "number is used again": ({"born": "1"}, False),
    "machine was started again": ({"boot": "another"}, True),
}


@pytest.mark.parametrize("why", DEAD)
def test_the_claim_of_a_dead_process_is_freed(why: str, out: OutputFolder, ours: Claims) -> None:
    """At once, and the death is reported once; a restart of the machine explains it."""
    changes, by_restart = DEAD[why]
    if "pid" in changes:
        changes = {"pid": dead_process()}
    another_run(out, "a", **changes)
    assert ours.take("a") == Death(by_restart=by_restart)
    assert ours.take("a") is True
    assert holds_claim(out, ours.holder.run, "a")


def test_the_claim_of_a_done_case_is_removed_if_its_run_is_dead(
    out: OutputFolder, ours: Claims
) -> None:
    another_run(out, "a", run="dead", pid=dead_process())
    another_run(out, "b", run="living", pid=os.getppid(), born=module._born(os.getppid()))
    for case in "abc":
        ours.remove_dead(case)
    assert not out.claim("a").exists()
    assert out.claim("b").exists()


def test_a_zombie_is_dead(out: OutputFolder, ours: Claims) -> None:
    """A process that has ended and whose parent has not noticed."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    another_run(out, "a", pid=process.pid, born=module._born(process.pid))
    assert ours.take("a") is False
    process.kill()
    time.sleep(0.5)  # not waited for
    assert isinstance(ours.take("a"), Death)
    process.wait()
    assert process.stdin is not None
    process.stdin.close()


@pytest.mark.parametrize("changes", [{"host": "node9"}, {"namespace": "pid:[9]"}])
@pytest.mark.parametrize(("age", "dead"), [(0, False), (0.8, False), (1.2, True), (100, True)])
def test_a_run_elsewhere_is_known_by_its_heartbeat(
    age: float, dead: bool, changes: dict[str, str], out: OutputFolder, ours: Claims
) -> None:
    """On another machine or in another container, whose process numbers mean nothing here."""
    another_run(out, "a", age=age * LEASE_SECONDS, **changes, pid=os.getpid(), boot="x")
    assert ours.take("a") == (Death(by_restart=False) if dead else False)


@pytest.mark.parametrize("ahead", [-40_000.0, 40_000.0])
def test_the_clock_of_the_file_system_counts(
    ahead: float, out: OutputFolder, ours: Claims, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server whose clock is hours ahead or behind changes nothing."""
    original = os.utime

    def utime(path: Any, times: Any = None) -> None:
        now = time.time() + ahead
        original(path, times or (now, now))

    monkeypatch.setattr(os, "utime", utime)
    another_run(out, "living", host="node9", age=10 - ahead)
    another_run(out, "dead", host="node9", age=2 * LEASE_SECONDS - ahead)
    assert ours.take("living") is False
    assert isinstance(ours.take("dead"), Death)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"run": 1}', b"\xff"])
def test_a_damaged_claim_holds_for_a_lease(content: bytes, out: OutputFolder, ours: Claims) -> None:
    """It may be one that is written at this moment; later nobody can hold it."""
    out.claim("a").parent.mkdir(parents=True)
    out.claim("a").write_bytes(content)
    assert ours.take("a") is False
    old = time.time() - 2 * LEASE_SECONDS
    os.utime(out.claim("a"), (old, old))
    assert isinstance(ours.take("a"), Death)
    assert ours.take("a") is True


def no_link(source: Path, target: Path) -> None:
    """Fail as a file system without hard links does, which looks up the folder first."""
    if not target.parent.is_dir():
        raise FileNotFoundError(2, "No such file or directory")
    raise PermissionError(1, "Operation not permitted")


def test_without_hard_links_claims_hold_too(
    out: OutputFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The claim is a file of its own, and the heartbeat is that of the run's file."""
    monkeypatch.setattr(os, "link", no_link)
    with Claims(out) as first, Claims(out) as second:
        first.holder = replace(first.holder, host="node9")
        assert first.take("a") is True
        old = time.time() - 2 * LEASE_SECONDS
        os.utime(out.claim("a"), (old, old))
        assert second.take("a") is False
        os.utime(first.file, (old, old))
        assert isinstance(second.take("a"), Death)
        assert second.take("a") is True


def test_a_run_that_was_taken_for_dead_does_not_release_what_is_not_its_own(
    out: OutputFolder,
) -> None:
    """The run that took the case over keeps its claim."""
    with Claims(out) as first, Claims(out) as second:
        assert first.take("a") is True
        first.file.unlink()  # the sweep of another run
        out.claim("a").unlink()
        assert second.take("a") is True
        first.release("a")
        assert holds_claim(out, second.holder.run, "a")
        assert first.take("b") is True  # with a new file


def test_two_runs_that_find_a_death_report_it_once(out: OutputFolder) -> None:
    """The second one finds the claim gone or taken."""
    with Claims(out) as first, Claims(out) as second:
        dead = another_run(out, "a", born="1")
        assert isinstance(first.take("a"), Death)
        assert second._remove_dead(out.claim("a"), dead) is False
        assert first.take("a") is True
        assert second._remove_dead(out.claim("a"), dead) is False
        assert holds_claim(out, first.holder.run, "a")


def test_a_removed_folder_is_not_made_again(out: OutputFolder) -> None:
    """Claiming in it ends the run."""
    with Claims(out) as claims:
        shutil.rmtree(out.root)
        with pytest.raises(RunStoppedError, match="removed or replaced"):
            claims.take("a")
        assert not out.root.exists()


def test_a_folder_that_cannot_be_written_is_refused(
    out: OutputFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an output folder that cannot be made is."""

    def write_text(*arguments: Any, **options: Any) -> int:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "write_text", write_text)
    with pytest.raises(ConfigError, match="cannot be written there: Read-only"), Claims(out):
        pass


def test_a_sweep_removes_what_is_dead_only(out: OutputFolder) -> None:
    """Files of runs and temporary files; not those of living processes, nor files of others."""
    dead, old = dead_process(), time.time() - 2 * OLD_TEMPORARY_SECONDS
    kept = {
        f".{host_code()}-{os.getpid()}-1{TEMPORARY_SUFFIX}": None,
        f".0badc0de-{dead}-1{TEMPORARY_SUFFIX}": None,
        f".strange{TEMPORARY_SUFFIX}": None,
        f".{host_code()}-x-1{TEMPORARY_SUFFIX}": None,
        "notes": old,
    }
    removed = {
        f".{host_code()}-{dead}-1{TEMPORARY_SUFFIX}": None,
        f".{host_code()}-{dead}-identity.json{TEMPORARY_SUFFIX}": None,
        f".0badc0de-{dead}-2{TEMPORARY_SUFFIX}": old,
        f".{host_code()}-{os.getpid()}-2{TEMPORARY_SUFFIX}": old,
    }
    for name, age in (kept | removed).items():
        (out.staging / name).write_text("")
        if age is not None:
            os.utime(out.staging / name, (age, age))
    living = another_run(out, None, run="living", host="node9")
    another_run(out, None, run="dead", born="1")
    another_run(out, None, run="lost", host="node9", age=2 * LEASE_SECONDS)
    (out.runs / "new.json").write_text("")
    with claims_of_run(out) as claims:
        assert {path.name for path in out.runs.iterdir()} == {
            claims.file.name,
            f"{living.run}.json",
            "new.json",
        }
    assert {path.name for path in out.staging.iterdir()} == set(kept)


def test_heartbeats_renew_the_lease(out: OutputFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all claims at once, by the thread too, and not at every call."""
    monkeypatch.setattr(module, "HEARTBEAT_SECONDS", 0.2)
    with Claims(out) as claims:
        claims.take("a")
        os.utime(claims.file, (1, 1))
        claims.beat()
        assert out.claim("a").stat().st_mtime == 1
        claims.beat_in_thread()
        time.sleep(0.6)
        assert time.time() - out.claim("a").stat().st_mtime < 60


def hammer(folder: Path, report: Path, rounds: int) -> None:
    """Take cases that others want too; die without a release now and then."""
    out = OutputFolder.create(folder)
    with Claims(out) as claims:
        for number in range(rounds):
            case = f"case{number % 7}"
            taken = claims.take(case)
            if taken is not True:
                continue
            mark = report / case
            # raises FileExistsError where two hold one claim
            os.close(os.open(mark, os.O_CREAT | os.O_EXCL))
            if number % 50 == 49:
                mark.unlink()
                os._exit(0)
            mark.unlink()
            claims.release(case)


@pytest.mark.slow
@pytest.mark.parametrize("links", [True, False])
def test_two_processes_never_hold_one_claim(
    links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight at a time want seven cases, and some die while they hold one."""
    if not links:
        monkeypatch.setattr(os, "link", no_link)
    report = tmp_path / "held"
    report.mkdir()
    context = multiprocessing.get_context("fork")
    for round in range(3):
        processes = [
            context.Process(target=hammer, args=(tmp_path / "out", report, 300 + round))
            for _ in range(8)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
            assert process.exitcode == 0
    assert not list(report.iterdir())
