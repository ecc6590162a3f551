from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from command import Volseg
from injected import Together, WhileReading, WhileWriting
from phantom import load_script
from report_batch import read_payload

from pipeline.batch import local_executor, run_batch
from pipeline.inference import Model
from pipeline.io.cases import find_cases
from pipeline.io.tables import read_csv

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="needs fork and signals"),
]
NAMES = "abcdef"
PRIOR = int(os.environ.get("VOLSEG_STRESS_CASES", "10000"))
MOMENTS = int(os.environ.get("VOLSEG_STRESS_MOMENTS", "20"))
VARYING = {"read_s", "preprocess_s", "network_s", "invert_s", "write_s", "peak_memory_mb", "reason"}


@pytest.fixture
def common(folder: Path, tiny_bundle_3d: Path) -> list[Any]:
    """The arguments of an undisturbed run."""
    return ["segment", folder / "in", "-o", folder / "out", "-b", tiny_bundle_3d, "--device", "cpu"]


def rows(out: Path) -> list[dict[str, str]]:
    """Return the rows of cases.csv without the columns that differ from run to run."""
    found = read_csv(out / "cases.csv")
    return [{key: text for key, text in row.items() if key not in VARYING} for row in found]


def statuses(out: Path) -> dict[str, str]:
    return {row["case"]: row["status"] for row in read_csv(out / "cases.csv")}


def are_done(out: Path, count: int) -> bool:
    return len(list(out.glob("*_seg.nii.gz"))) >= count


def check_whole(out: Path, expected: Path) -> None:
    """Check that a folder is that of a run that nobody disturbed."""
    inputs = [{**row, "input": Path(row["input"]).name} for row in rows(out)]
    assert inputs == [{**row, "input": Path(row["input"]).name} for row in rows(expected)]
    for path in expected.glob("*_seg.nii.gz"):
        assert (out / path.name).read_bytes() == path.read_bytes()
    assert (out / "volumes.csv").read_bytes() == (expected / "volumes.csv").read_bytes()
    check_clean(out)
    assert {path.name for path in out.iterdir()} == {path.name for path in expected.iterdir()}


def check_clean(out: Path) -> None:
    """Check that no temporary file and no file of a run is left.

    A run that was killed may leave the claim of a case whose record it has written.
    """
    left = [path for path in out.rglob("*") if path.is_file()]
    assert not [path for path in left if path.name.endswith(".tmp")]
    assert not [path for path in left if "runs" in path.parts]
    for path in left:
        if "claims" in path.parts:
            record = out / ".volseg" / "records" / path.parent.name / f"{path.name}.json"
            assert record.exists()


@pytest.mark.parametrize("jobs", [pytest.param(1, marks=pytest.mark.stress), 2])
def test_a_killed_run_is_finished_by_the_next(
    jobs: int, volseg: Volseg, common: list[Any], folder: Path, expected: Path
) -> None:
    """Killed while it works, twice; then everything is as if nothing had happened."""
    slow = WhileReading((), "sleep", 0.5)
    for done in (1, 3):
        running = volseg.start(*common, "--jobs", jobs, fault=slow)
        running.wait_for(partial(are_done, folder / "out", done))
        running.kill()
    status, text = volseg(*common, "--jobs", jobs)
    assert status == 0, text
    check_whole(folder / "out", expected)


def test_a_report_of_a_killed_run(volseg: Volseg, common: list[Any], folder: Path) -> None:
    """The report shows the finished cases and a note that others may be missing.

    After the next run the report has every case and no such note.
    """
    out = folder / "out"
    running = volseg.start(*common, "--jobs", 2, fault=WhileReading((), "sleep", 0.5))
    running.wait_for(partial(are_done, out, 2))
    running.kill()
    status, text = volseg("report", out)
    assert status == 0, text
    assert "a run is under way in the folder, or was killed" in text
    batch = read_payload(out / "report" / "data" / "batch.js")
    assert not batch["complete"]
    assert 1 <= len(batch["cases"]) < len(NAMES)
    assert all(case["mosaic"] or case["picture_problem"] for case in batch["cases"])
    status, text = volseg(*common, "--report")
    assert status == 0, text
    assert "was killed" not in text
    batch = read_payload(out / "report" / "data" / "batch.js")
    assert batch["complete"]
    assert [case["case"] for case in batch["cases"]] == list(NAMES)


def test_a_case_that_kills_its_worker_is_given_up(
    volseg: Volseg, common: list[Any], folder: Path
) -> None:
    """After its second death, alone; the others are done. It is tried again on demand only."""
    status, text = volseg(*common, fault=WhileReading(("c",), "kill"))
    assert status == 1
    assert "quarantined c: the process died 2 times while it computed this case" in text
    assert "SIGKILL" in text
    assert statuses(folder / "out") == dict.fromkeys("abdef", "done") | {"c": "quarantined"}
    check_clean(folder / "out")
    begun = (folder / "out" / "volseg.log").read_text().count("a process died")
    assert begun == 2
    status, text = volseg(*common)
    assert status == 1
    assert "5 of 6 cases are in" in text
    assert statuses(folder / "out")["c"] == "quarantined"
    status, text = volseg(*common, "--overwrite")
    assert status == 0, text
    assert set(statuses(folder / "out").values()) == {"done"}


@pytest.mark.parametrize("action", ["kill", pytest.param("segfault", marks=pytest.mark.stress)])
def test_a_death_that_does_not_come_again_costs_nothing(
    action: str, volseg: Volseg, common: list[Any], folder: Path, expected: Path
) -> None:
    """As when memory was short for a moment."""
    once = WhileReading(("c",), action, once=str(folder / "happened"))
    status, text = volseg(*common, "--jobs", 2, fault=once)
    assert status == 0, text
    check_whole(folder / "out", expected)


def test_a_case_that_hangs_is_stopped(volseg: Volseg, common: list[Any], folder: Path) -> None:
    """With its own reason; the next run tries it again."""
    hang = WhileReading(("b",), "hang")
    begun = time.monotonic()
    status, text = volseg(*common, "--jobs", 2, "--case-timeout", 3, fault=hang)
    assert time.monotonic() - begun < 60
    assert status == 1
    assert "failed   b: took longer than --case-timeout allows, 3 s; it was killed" in text
    assert statuses(folder / "out") == dict.fromkeys("acdef", "done") | {"b": "failed"}
    check_clean(folder / "out")
    assert volseg(*common)[0] == 0


def test_a_reader_that_exits_fails_its_case(
    volseg: Volseg, common: list[Any], folder: Path
) -> None:
    """Not the process."""
    status, text = volseg(*common, fault=WhileReading(("d",), "exit"))
    assert status == 1
    assert "failed   d: unexpected SystemExit" in text
    assert statuses(folder / "out") == dict.fromkeys("abcef", "done") | {"d": "failed"}


def test_a_file_that_vanishes_fails_its_case(
    volseg: Volseg, common: list[Any], folder: Path
) -> None:
    """After the run was planned."""
    status, text = volseg(*common, fault=WhileReading(("d",), "remove"))
    assert status == 1
    assert "failed   d: " in text
    assert "d.nii.gz" in text
    assert statuses(folder / "out") == dict.fromkeys("abcef", "done") | {"d": "failed"}


@pytest.mark.parametrize("part", ["/records/", "_seg.nii.gz", "cases.csv"])
def test_errors_of_a_disk_that_pass_are_tried_again(
    part: str, volseg: Volseg, common: list[Any], folder: Path, expected: Path
) -> None:
    """Of records, of outputs and of tables."""
    status, text = volseg(*common, fault=WhileWriting(part))
    assert status == 0, text
    check_whole(folder / "out", expected)


def test_outputs_that_cannot_be_written_fail_their_cases(
    volseg: Volseg, common: list[Any], folder: Path, expected: Path
) -> None:
    """An error that does not pass; the next run writes them."""
    assert volseg(*common, fault=WhileWriting("b_seg.nii.gz", times=100))[0] == 1
    assert statuses(folder / "out") == dict.fromkeys("acdef", "done") | {"b": "failed"}
    assert volseg(*common)[0] == 0
    check_clean(folder / "out")


def test_records_that_cannot_be_written_stop_the_run(
    volseg: Volseg, common: list[Any], folder: Path, expected: Path
) -> None:
    """With the reason and what remains."""
    status, text = volseg(*common, fault=WhileWriting("/records/", times=100))
    assert status == 1
    assert "no record can be written" in text
    assert "6 cases are not done; start the same command again" in text
    status, text = volseg(*common)
    assert status == 0, text
    check_whole(folder / "out", expected)


@pytest.mark.parametrize(
    "more",
    [[], pytest.param(["--max-memory", "2G"], marks=pytest.mark.stress)],
    ids=["", "max_memory"],
)
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_run_in_order(
    number: int,
    status: int,
    more: list[str],
    volseg: Volseg,
    common: list[Any],
    folder: Path,
    expected: Path,
) -> None:
    """No partial file and no failed row; it says what remains, and the next run does that."""
    slow = WhileReading((), "sleep", 0.7)
    running = volseg.start(*common, *more, "--jobs", 2, fault=slow)
    running.wait_for(lambda: "done" in running.text)
    running.signal(number)
    assert running.wait(30) == status
    text = running.text
    name = signal.Signals(number).name
    assert f"interrupted ({name})" in text
    assert "cases are not done; start the same command again: it continues with them" in text
    assert "Traceback" not in text
    assert "failed" not in text
    found = statuses(folder / "out")
    assert set(found.values()) == {"done"}
    assert len(found) == len(list((folder / "out").glob("*_seg.nii.gz")))
    check_clean(folder / "out")
    again, text = volseg(*common, *more)
    assert again == 0, text
    check_whole(folder / "out", expected)


def test_a_second_signal_stops_at_once(
    volseg: Volseg, common: list[Any], folder: Path, expected: Path
) -> None:
    """Although a worker does not answer; the next run finishes the work."""
    hang = WhileReading(("b",), "hang")
    stuck = Together((hang, _DeafWorkers()))
    running = volseg.start(*common, "--jobs", 2, fault=stuck)
    running.wait_for(lambda: "done" in running.text)
    running.signal(signal.SIGINT)
    time.sleep(1.0)
    assert running.process.is_alive()
    begun = time.monotonic()
    running.signal(signal.SIGINT)
    assert running.wait(10) == 130
    assert time.monotonic() - begun < 3
    status, text = volseg(*common)
    assert status == 0, text
    check_whole(folder / "out", expected)


class _DeafWorkers:
    """Worker processes that do not end when they are asked to."""

    def __call__(self) -> None:
        from pipeline.batch import pool

        pool._end = lambda number, frame: None


def finished_before(folder: Path, model: Model, count: int) -> Path:
    """Return an output folder with the records of many cases, whose inputs are in `in/many`."""
    script = load_script("stress_batch")
    script.make_inputs(folder / "in" / "many", count)
    # no power cut is to be survived here, and waiting for the disk takes most of the time
    with script.nothing_to_read(), patch("os.fsync"):
        cases = find_cases([folder / "in" / "many"], model.spec)
        for case in cases:  # the names that they have below `in`
            case["case"] = f"many/{case['case']}"
        run_batch(model, cases, folder / "out", local_executor, predict=script.predict)
    return folder / "out"


@pytest.mark.stress
@pytest.mark.parametrize("prior", [0, PRIOR])
def test_kills_at_any_moment_lose_nothing(
    prior: int,
    volseg: Volseg,
    common: list[Any],
    folder: Path,
    expected: Path,
    model_3d: Model,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Runs are killed at random moments, in folders that hold up to 10,000 results already.

    Each is finished by the next run, and its rows, maps and tables are those of undisturbed runs.
    """
    source = random.Random(11)
    out, began = folder / "out", folder / "began"
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "scripts")
    if prior:
        finished_before(folder, model_3d, prior).rename(began)
    for _ in range(MOMENTS):
        shutil.rmtree(out, ignore_errors=True)
        if prior:
            shutil.copytree(began, out)  # the times of files are kept
        running = volseg.start(*common, "--jobs", 2, fault=WhileReading((), "sleep", 0.05))
        time.sleep(source.uniform(0.0, 2.5 + prior / 2000))
        running.kill()
        status, text = volseg(*common)
        assert status == 0, text
        if prior:
            found = statuses(out)
            assert len(found) == prior + len(NAMES)
            assert set(found.values()) == {"done"}
            assert len(read_csv(out / "volumes.csv")) == prior + len(NAMES)
            for path in expected.glob("*_seg.nii.gz"):
                assert (out / path.name).read_bytes() == path.read_bytes()
            check_clean(out)
        else:
            check_whole(out, expected)
