from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from batch_folders import record_of, store

from pipeline.batch.bids_group import write_group_table
from pipeline.batch.records import CaseRecord
from pipeline.errors import ConfigError


def record(subject: str, session: str = "", rest: str = "", **changes: Any) -> CaseRecord:
    columns = {"participant_id": f"sub-{subject}"}
    folder, stem = f"sub-{subject}", f"sub-{subject}"
    if session:
        columns["session_id"] = f"ses-{session}"
        folder, stem = f"{folder}/ses-{session}", f"{stem}_ses-{session}"
    return record_of(f"{folder}/anat/{stem}{rest}_T1w", columns=columns, **changes)


def table(folder: Path) -> list[dict[str, str]]:
    with open(folder / "group_volumes.tsv", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    root.mkdir()
    (root / "participants.tsv").write_text(
        "participant_id\tage\tstatus\nsub-01\t39\tpatient\nsub-03\t50\tcontrol\n"
    )
    (root / "participants.json").write_text('{"age": {"Units": "year"}}')
    return root


def test_each_image_has_a_row_with_its_participant(dataset: Path, tmp_path: Path) -> None:
    """A failed image has no volumes, a participant who is not listed no age."""
    store(
        tmp_path / "out",
        record("01", "a", "_run-1", volumes_mm3={"left caudate": 3900.5}),
        record("01", "b", status="failed", volumes_mm3={}),
        record("02", volumes_mm3={"left caudate": 4000.0}, warnings=("one", "two")),
    )
    result = write_group_table(dataset, tmp_path / "out")
    assert (result.rows, result.unknown, result.without_image) == (3, ["sub-02"], ["sub-03"])
    first, second, third = table(tmp_path / "out")
    assert first == {
        "participant_id": "sub-01",
        "session_id": "ses-a",
        "run": "1",
        "image": "sub-01/ses-a/anat/sub-01_ses-a_run-1_T1w",
        "status": "done",
        "warnings": "n/a",
        "age": "39",
        "participants_status": "patient",
        "left_caudate": "3900.500",
    }
    assert (second["status"], second["left_caudate"], second["age"]) == ("failed", "n/a", "39")
    assert (third["session_id"], third["age"], third["warnings"]) == ("n/a", "n/a", "one; two")


def test_each_column_is_explained_with_its_unit(dataset: Path, tmp_path: Path) -> None:
    store(tmp_path / "out", record("01", volumes_mm3={"3rd ventricle": 1.0, "brain-stem": 2.0}))
    write_group_table(dataset, tmp_path / "out")
    dictionary = json.loads((tmp_path / "out" / "group_volumes.json").read_text())
    assert list(dictionary) == list(table(tmp_path / "out")[0])
    assert dictionary["3rd_ventricle"] == {"Description": "Volume: 3rd ventricle.", "Units": "mm^3"}
    assert dictionary["age"] == {"Units": "year"}
    assert "session_id" not in dictionary


def test_structures_whose_columns_would_be_one_have_two(dataset: Path, tmp_path: Path) -> None:
    store(tmp_path / "out", record("01", volumes_mm3={"a-b": 1.0, "a b": 2.0}))
    write_group_table(dataset, tmp_path / "out")
    row = table(tmp_path / "out")[0]
    assert (row["a_b"], row["a_b_"]) == ("1.000", "2.000")


def test_participants_may_be_missing(tmp_path: Path) -> None:
    store(tmp_path / "out", record("01"))
    result = write_group_table(tmp_path, tmp_path / "out")
    assert (result.rows, result.unknown, result.without_image) == (1, [], [])
    assert "age" not in table(tmp_path / "out")[0]


def sessions(dataset: Path, subject: str, text: str) -> None:
    folder = dataset / subject
    folder.mkdir(exist_ok=True)
    (folder / f"{subject}_sessions.tsv").write_text(text)


def test_each_image_has_the_facts_of_its_session(dataset: Path, tmp_path: Path) -> None:
    """By participant and session; an image without a session, or without a row, has none."""
    sessions(dataset, "sub-01", "session_id\tage_at_session\tsystem\nses-a\t39.5\tx\nses-b\t41\t\n")
    sessions(dataset, "sub-02", "session_id\tage_at_session\tmood\na\t50\tgood\n")
    sessions(dataset, "sub-04", "session_id\tage_at_session\nses-z\t1\n")
    (dataset / "sub-02" / "sub-02_sessions.json").write_text('{"mood": {"Levels": {"good": ":)"}}}')
    (dataset / "sessions.json").write_text('{"age_at_session": {"Units": "year"}}')
    records = [record("01", "b"), record("01", "a", "_run-1"), record("01", "a", "_run-2")]
    records += [record("02", "a"), record("02", "c"), record("03"), record("04", "y")]
    store(tmp_path / "out", *records)
    result = write_group_table(dataset, tmp_path / "out")
    rows = {row["image"].split("/")[-1]: row for row in table(tmp_path / "out")}
    columns = ("age_at_session", "system", "mood")
    assert {name: tuple(row[key] for key in columns) for name, row in rows.items()} == {
        "sub-01_ses-a_run-1_T1w": ("39.5", "x", "n/a"),
        "sub-01_ses-a_run-2_T1w": ("39.5", "x", "n/a"),
        "sub-01_ses-b_T1w": ("41", "n/a", "n/a"),
        "sub-02_ses-a_T1w": ("50", "n/a", "good"),
        "sub-02_ses-c_T1w": ("n/a", "n/a", "n/a"),
        "sub-03_T1w": ("n/a", "n/a", "n/a"),
        "sub-04_ses-y_T1w": ("n/a", "n/a", "n/a"),
    }
    assert result.unknown_sessions == ["sub-02 ses-c", "sub-04 ses-y"]
    assert result.in_both == {}
    dictionary = json.loads((tmp_path / "out" / "group_volumes.json").read_text())
    assert list(dictionary) == list(table(tmp_path / "out")[0])
    assert dictionary["age_at_session"] == {"Units": "year"}
    assert dictionary["mood"] == {"Levels": {"good": ":)"}}
    assert dictionary["system"] == {"Description": "As in the participant's sessions.tsv."}


def test_columns_of_the_same_name_are_all_kept(dataset: Path, tmp_path: Path) -> None:
    """Ours have their names, then those of participants, then those of sessions."""
    sessions(
        dataset,
        "sub-01",
        "session_id\tage\tstatus\tsessions_age\tleft_caudate\nses-a\t41\tdrunk\told\t7\n",
    )
    store(tmp_path / "out", record("01", "a", volumes_mm3={"left caudate": 1.0}))
    result = write_group_table(dataset, tmp_path / "out")
    assert result.in_both == {"age": "sessions_sessions_age", "status": "sessions_status"}
    (row,) = table(tmp_path / "out")
    assert (row["age"], row["sessions_sessions_age"], row["sessions_age"]) == ("39", "41", "old")
    assert (row["status"], row["participants_status"]) == ("done", "patient")
    assert (row["sessions_status"], row["left_caudate"]) == ("drunk", "1.000")
    assert row["sessions_left_caudate"] == "7"
    dictionary = json.loads((tmp_path / "out" / "group_volumes.json").read_text())
    assert dictionary["age"] == {"Units": "year"}
    assert "sessions.tsv" in dictionary["sessions_sessions_age"]["Description"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "session\tage\nses-a\t1\n",
            "sub-01_sessions.tsv: found the columns session, age, expected",
        ),
        ("session_id\tage\nses-a\t1\na\t2\n", "ses-a has two rows; keep one"),
    ],
)
def test_a_wrong_table_of_sessions_is_an_error(
    dataset: Path, tmp_path: Path, text: str, says: str
) -> None:
    sessions(dataset, "sub-01", text)
    store(tmp_path / "out", record("01", "a"))
    with pytest.raises(ConfigError, match=says):
        write_group_table(dataset, tmp_path / "out")


def test_some_participants(dataset: Path, tmp_path: Path) -> None:
    store(tmp_path / "out", record("01"), record("02"))
    assert write_group_table(dataset, tmp_path / "out", ["sub-02"]).rows == 1
    with pytest.raises(ConfigError, match="no result of these participants"):
        write_group_table(dataset, tmp_path / "out", ["09"])


def test_a_folder_without_results_is_an_error(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no output folder of volseg"):
        write_group_table(dataset, tmp_path / "none")
    store(tmp_path / "out", record_of("plain"))
    with pytest.raises(ConfigError, match="run the level `participant` first"):
        write_group_table(dataset, tmp_path / "out")
