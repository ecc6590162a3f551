from __future__ import annotations

import mmap
import multiprocessing
import pickle
from pathlib import Path

import pytest

from pipeline.batch.log_file import append_log
from pipeline.batch.peak_memory import PeakMemory

MIB = 2**20


def write_lines(path: Path, name: str) -> None:
    for number in range(200):
        append_log(path, f"{name} {number} " + name * 300)


@pytest.mark.slow
def test_lines_of_several_processes_do_not_mix(tmp_path: Path) -> None:
    """Each is whole, and none is lost."""
    path = tmp_path / "volseg.log"
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=write_lines, args=(path, name)) for name in "abcd"]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    lines = path.read_text().splitlines()
    assert len(lines) == 800
    for line in lines:
        _, _, _, name, number, text = line.split(" ")
        assert text == name * 300
        assert int(number) < 200


def test_a_log_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    """Names of any bytes and line breaks are one line."""
    append_log(tmp_path / "no folder" / "volseg.log", "text")
    append_log(tmp_path / "volseg.log", "a\nb \udcfc")
    (line,) = (tmp_path / "volseg.log").read_text().splitlines()
    assert line.endswith(" a\\nb \\xfc")


def test_peaks_of_cases_that_overlap() -> None:
    """What was in use during a case counts for it, and not for the cases after it."""
    peaks = PeakMemory()
    peaks.begin("before")
    peaks.end("before")
    peaks.begin("first")
    peaks.begin("second")
    # not from malloc, which keeps what was freed once a test has trained in this process
    large = mmap.mmap(-1, 200 * MIB)
    for page in range(0, len(large), mmap.PAGESIZE):
        large[page] = 1
    large.close()
    first = peaks.end("first")
    peaks.begin("third")
    second, third = peaks.end("second"), peaks.end("third")
    assert first == second
    assert first - third > 150 * MIB
    assert peaks.end("unknown") == 0


def test_a_spawned_process_counts_its_own() -> None:
    """It can be sent to one."""
    peaks = PeakMemory()
    peaks.begin("a")
    assert pickle.loads(pickle.dumps(peaks)).end("a") == 0
