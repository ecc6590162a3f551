from __future__ import annotations

import json
import random
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
from batch_folders import record_of, store

from pipeline.batch.outputs import OutputFolder
from pipeline.batch.records import CaseRecord, FileState, read_record, write_record

LETTERS = 'ab ö✓\n\t"\\/,;\udcfc\x7f'


def any_record(random: random.Random) -> CaseRecord:
    """Return a record with values of every kind, names that are not UTF-8 included."""

    def text() -> str:
        return "".join(random.choices(LETTERS, k=random.randrange(9)))

    def file() -> FileState:
        return FileState(
            path=text(), size=random.randrange(2**50), mtime_ns=random.randrange(2**63), sha256="f0"
        )

    def texts() -> tuple[str, ...]:
        return tuple(text() for _ in range(random.randrange(3)))

    def numbers() -> dict[str, float]:
        return {name: random.uniform(-1e9, 1e9) for name in texts()}

    return CaseRecord(
        case="x" + text(),
        status=random.choice(["done", "failed", "quarantined"]),
        image=texts(),
        error=text(),
        error_class=text(),
        reason=text(),
        warnings=texts(),
        seconds=numbers(),
        peak_memory=random.randrange(2**40),
        volumes_mm3=numbers(),
        inputs=tuple(file() for _ in range(random.randrange(3))),
        outputs=tuple(file() for _ in range(random.randrange(3))),
        columns=dict.fromkeys(texts(), text()),
        made_by=dict.fromkeys(texts(), text()),
        computed=random.choice([None, {}, {"runtime": text(), "threads": 3, "flags": [text()]}]),
        versions=dict.fromkeys(texts(), text()),
        host=text(),
        started=text(),
        ended=text(),
    )


def test_a_record_comes_back_as_it_was_written(tmp_path: Path) -> None:
    """Every field, with line breaks, surrogates of undecodable bytes, and large numbers."""
    out, source = OutputFolder.create(tmp_path / "out"), random.Random(3)
    for _ in range(200):
        record = any_record(source)
        write_record(out, record)
        assert read_record(out.record(record.case)) == record
    assert not list(out.staging.iterdir())


def test_a_cut_record_is_no_record(tmp_path: Path) -> None:
    """Wherever it is cut."""
    out = store(tmp_path / "out", record_of("a"))
    path = out.record("a")
    whole = path.read_bytes()
    for length in range(0, len(whole), 3):
        path.write_bytes(whole[:length])
        assert read_record(path) is None


def test_damaged_bytes_never_raise(tmp_path: Path) -> None:
    """What is read is no record, or one whose fields have their types."""
    out, source = store(tmp_path / "out", record_of("a")), random.Random(5)
    path = out.record("a")
    whole = path.read_bytes()
    kinds = {item.name: type(getattr(record_of("a"), item.name)) for item in fields(CaseRecord)}
    for _ in range(500):
        content = bytearray(whole)
        for _ in range(source.randrange(1, 4)):
            content[source.randrange(len(content))] = source.randrange(256)
        path.write_bytes(content)
        record = read_record(path)
        if record is not None:
            for name, kind in kinds.items():
                assert isinstance(getattr(record, name), kind) or name == "computed"


FOREIGN: list[Any] = [
    None,
    [],
    3,
    "text",
    {},
    {"case": "a"},
    {"status": "done"},
]


@pytest.mark.parametrize("content", FOREIGN, ids=str)
def test_other_json_is_no_record(content: Any, tmp_path: Path) -> None:
    """A file that somebody else wrote is passed over."""
    path = tmp_path / "x.json"
    path.write_text(json.dumps(content))
    assert read_record(path) is None


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"format": None},
        {"status": "skipping"},
        {"status": 1},
        {"case": 5},
        {"columns": ["a"]},
        {"columns": None},
        {"seconds": None},
        {"volumes_mm3": []},
        {"peak_memory": "much"},
        {"warnings": 3},
        {"inputs": [{"path": "a"}]},
        {"inputs": [3]},
        {"outputs": {"a": 1}},
        {"error": None},
        {"made_by": "tiny"},
        {"computed": []},
    ],
    ids=str,
)
def test_a_record_with_a_wrong_field_is_no_record(change: dict[str, Any], tmp_path: Path) -> None:
    """Also one of another format, which may mean something else by the same keys."""
    out = store(tmp_path / "out", record_of("a"))
    path = out.record("a")
    path.write_text(json.dumps(json.loads(path.read_bytes()) | change))
    assert read_record(path) is None


def test_deep_nesting_is_no_record(tmp_path: Path) -> None:
    """JSON that exhausts the stack of the parser does not end a batch."""
    path = tmp_path / "x.json"
    path.write_text("[" * 200_000)
    assert read_record(path) is None


def test_unknown_keys_are_ignored(tmp_path: Path) -> None:
    """A later version of volseg may add some; those that are missing have their defaults."""
    out = store(tmp_path / "out", record_of("a"))
    path = out.record("a")
    content = json.loads(path.read_bytes())
    del content["peak_memory"]
    path.write_text(json.dumps(content | {"later": 1}))
    assert asdict(read_record(path) or record_of("b")) == asdict(record_of("a", peak_memory=0))
