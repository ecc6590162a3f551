from __future__ import annotations

import json
import multiprocessing
import random
import threading
from pathlib import Path

import pytest
from batch_folders import record_of, store

from pipeline.batch.outputs import OutputFolder
from pipeline.batch.records import CaseRecord, write_record
from pipeline.batch.tables import case_columns, write_tables
from pipeline.errors import ConfigError
from pipeline.io.tables import read_csv

TABLES = ("cases.csv", "volumes.csv", "run.json")


def tables_of(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in TABLES}


def some_records() -> list[CaseRecord]:
    """Return records of all states, some with columns of a manifest."""
    return [
        record_of("sub/b", columns={"site": "A", "age": "7"}),
        record_of("a", warnings=("odd", "very odd")),
        record_of("c", status="failed", error="no, not this one\nat all", volumes_mm3={}),
        record_of("d", status="quarantined", error="it died", computed=None),
        record_of("Ö \udcfc"),
        *(record_of(f"n{number}", columns={"site": str(number)}) for number in range(30)),
    ]


def test_tables_do_not_depend_on_the_order_of_writing(tmp_path: Path) -> None:
    """They are equal byte for byte, rows sorted by case, one per record."""
    expected = None
    for seed in range(3):
        records = some_records()
        random.Random(seed).shuffle(records)
        out = store(tmp_path / str(seed), *records)
        counts = write_tables(out.root)
        assert counts == {"done": 33, "failed": 1, "quarantined": 1}
        names = [row["case"] for row in read_csv(out.root / "cases.csv")]
        assert names == sorted(names)
        assert len(names) == 35
        assert len(read_csv(out.root / "volumes.csv")) == 33
        expected = expected or tables_of(out.root)
        assert tables_of(out.root) == expected


def test_what_somebody_did_to_a_table_does_not_matter(tmp_path: Path) -> None:
    """Edited, damaged, deleted or saved by a spreadsheet: it is derived as before."""
    out = store(tmp_path / "out", *some_records())
    write_tables(out.root)
    before = tables_of(out.root)
    for name in TABLES:
        path = out.root / name
        for content in (b"", b"\xef\xbb\xbf" + before[name], b"\xff\x00,,,\n", None):
            path.unlink() if content is None else path.write_bytes(content)
            write_tables(out.root)
            assert tables_of(out.root) == before


def test_columns_of_a_manifest_are_kept(tmp_path: Path) -> None:
    """In both tables; one with the name of ours gets `manifest_` in front."""
    columns = {"site": "A", "status": "control", "front": "left"}
    out = store(tmp_path / "out", record_of("a", columns=columns), record_of("b"))
    write_tables(out.root)
    first, second = read_csv(out.root / "cases.csv")
    assert (first["site"], first["manifest_status"], first["status"]) == ("A", "control", "done")
    assert (second["site"], second["manifest_status"]) == ("", "")
    volumes, _ = read_csv(out.root / "volumes.csv")
    assert (volumes["site"], volumes["manifest_front"], volumes["front"]) == ("A", "left", "12.5")


def test_a_name_or_message_with_line_breaks_is_one_row(tmp_path: Path) -> None:
    """A name of any bytes can be written as UTF-8."""
    out = store(
        tmp_path / "out",
        record_of("a\nb", status="failed", error='one, "two"\nthree'),
        record_of("\udcfc"),
    )
    write_tables(out.root)
    rows = read_csv(out.root / "cases.csv")
    assert [row["case"] for row in rows] == ["\\xfc", "a\\nb"]
    assert rows[1]["message"] == 'one, "two"\nthree'


def test_damaged_and_foreign_files_among_the_records_are_passed_over(tmp_path: Path) -> None:
    """The other rows are all there."""
    out = store(tmp_path / "out", record_of("a"), record_of("b"))
    out.record("b").write_bytes(out.record("b").read_bytes()[:50])
    (out.record("a").parent / "notes.txt").write_text("mine")
    (out.record("a").parent / "notes.json").write_text("[1]")
    assert write_tables(out.root) == {"done": 1}


def test_a_folder_without_records_is_refused(tmp_path: Path) -> None:
    """With the reason; an output folder without cases has tables without rows."""
    with pytest.raises(ConfigError, match="no output folder of volseg"):
        write_tables(tmp_path)
    assert write_tables(OutputFolder.create(tmp_path / "out").root) == {}
    assert read_csv(tmp_path / "out" / "cases.csv") == []


def write_some(folder: Path, first: int) -> None:
    out = OutputFolder.create(folder)
    for number in range(first, first + 15):
        write_record(out, record_of(f"n{number:03}"))
        write_tables(folder)


def test_threads_that_derive_at_the_same_time_lose_no_row(tmp_path: Path) -> None:
    """The tables of the one that ends last hold all records."""
    threads = [
        threading.Thread(target=write_some, args=(tmp_path / "out", first))
        for first in range(0, 60, 15)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read_csv(tmp_path / "out" / "cases.csv")) == 60
    assert json.loads((tmp_path / "out" / "run.json").read_text())["cases"] == {"done": 60}


@pytest.mark.slow
def test_processes_that_derive_at_the_same_time_lose_no_row(tmp_path: Path) -> None:
    """The same, for runs of one folder."""
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=write_some, args=(tmp_path / "out", first))
        for first in range(0, 90, 15)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert len(read_csv(tmp_path / "out" / "cases.csv")) == 90


def test_deriving_ends_while_others_go_on_writing(tmp_path: Path) -> None:
    """A run that is ready does not wait for the end of the other runs of its folder."""
    out = store(tmp_path / "out", *some_records())
    stop = threading.Event()

    def go_on() -> None:
        number = 0
        while not stop.is_set():
            write_record(out, record_of(f"other{number}"))
            number += 1

    other = threading.Thread(target=go_on)
    other.start()
    ready = threading.Thread(target=write_tables, args=(out.root,), daemon=True)
    ready.start()
    ready.join(10)
    ended = not ready.is_alive()
    stop.set()
    other.join()
    assert ended


def test_seconds_of_steps_that_were_not_done_are_empty() -> None:
    """As is the memory where it is not known."""
    row = case_columns(record_of("a", seconds={"read": 1.23456}, peak_memory=0))
    assert (row["read_s"], row["network_s"], row["peak_memory_mb"]) == ("1.235", "", "")


def test_a_predicted_dice_has_columns_and_a_table(tmp_path: Path) -> None:
    """Mean and interval in cases.csv, structures in quality.csv; without any, neither."""
    interval = {"dice": 0.81234, "low": 0.7, "high": 0.9}
    predicted = {"mean": interval, "labels": {"front": interval | {"dice": 0.5}}}
    out = store(
        tmp_path / "out",
        record_of("a", predicted_dice=predicted, columns={"predicted_dice": "x", "site": "1"}),
        record_of("b", predicted_dice={"mean": interval, "labels": {}}),
        record_of("c", status="failed", error="no", volumes_mm3={}),
    )
    write_tables(out.root)
    first, second, third = read_csv(out.root / "cases.csv")
    assert first["predicted_dice"] == "0.812"
    assert (first["predicted_dice_low"], first["predicted_dice_high"]) == ("0.700", "0.900")
    assert first["manifest_predicted_dice"] == "x"
    assert second["predicted_dice"] == "0.812"
    assert third["predicted_dice"] == ""
    of_labels = read_csv(out.root / "quality.csv")
    assert [row["case"] for row in of_labels] == ["a", "b"]
    assert [row["front"] for row in of_labels] == ["0.500", ""]
    assert of_labels[0]["front_low"] == "0.700"

    plain = store(tmp_path / "plain", record_of("a"))
    write_tables(plain.root)
    assert "predicted_dice" not in read_csv(plain.root / "cases.csv")[0]
    assert not (plain.root / "quality.csv").exists()
