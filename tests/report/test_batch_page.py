"""The report of a batch: which files it has, what they hold, and what may not get into them."""

from __future__ import annotations

import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from batch_folders import record_of, store
from click.testing import CliRunner
from phantom import save
from report_batch import LABELS, add_case, head, read_payload

from pipeline.batch.outputs import OutputFolder
from pipeline.batch.records import read_record, write_record
from pipeline.cli import main
from pipeline.errors import ConfigError, WriteError
from pipeline.io import label_table, sha256
from pipeline.report import ReportOptions, read_marks, write_batch_report
from pipeline.report.payload import payload

ROOT = Path(__file__).parent.parent.parent
HOSTILE = "<img src=x onerror=alert(1)> \"'`&</script>\n\u2028\t=1+1"


def batch_of(folder: Path, **options: Any) -> dict[str, Any]:
    """Write the report and return the data of its page."""
    page = write_batch_report(folder, options=ReportOptions(**options))
    return dict(read_payload(page.parent / "data" / "batch.js"))


def rows_of(folder: Path, **options: Any) -> dict[str, dict[str, Any]]:
    """Write the report and return case → row."""
    return {row["case"]: row for row in batch_of(folder, **options)["cases"]}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An output folder with two cases that were done, one with a warning, and two failures."""
    folder = tmp_path / "out"
    add_case(folder, "sub/one")
    add_case(folder, "sub/two", warnings=("structures touch the edge",))
    failed: dict[str, Any] = {"volumes_mm3": {}, "inputs": (), "computed": None}
    store(
        folder,
        record_of("bad", status="failed", error="bad.nii: cannot be read", **failed),
        record_of("worse", status="quarantined", error="the process died", **failed),
    )
    return folder


def test_every_case_has_a_row(out: Path) -> None:
    """With status, message, warnings and volumes; pictures for those that have a label map."""
    batch = batch_of(out)
    rows = {row["case"]: row for row in batch["cases"]}
    assert list(rows) == ["bad", "sub/one", "sub/two", "worse"]
    assert [row["status"] for row in rows.values()] == ["failed", "done", "done", "quarantined"]
    assert rows["bad"]["message"] == "bad.nii: cannot be read"
    assert rows["bad"]["volumes"] is None
    assert [item["name"] for item in batch["structures"]] == [
        "left thalamus",
        "right putamen",
        "both",
    ]
    assert rows["sub/one"]["volumes"] == [3000.0, 3100.0, 6100.0]
    report = out / "report"
    for name, row in rows.items():
        pictures = [report / "mosaics" / f"{row['mosaic']}{end}.webp" for end in ("", "_outlines")]
        assert all(path.is_file() for path in pictures) == name.startswith("sub/")
    assert [bool(row["volume"]) for row in rows.values()] == [False, False, True, False]
    assert batch["run"]["cases"] == {"done": 2, "failed": 1, "quarantined": 1}


def test_structures_have_the_colours_of_the_table(out: Path) -> None:
    colors = {label.name: list(label.color) for label in label_table(LABELS)}
    for item in batch_of(out)["structures"]:
        assert item["color"] == colors.get(item["name"])


def test_the_page_needs_nothing_else(out: Path) -> None:
    """Every file that it names is in the folder, and its policy allows no connection."""
    page = write_batch_report(out)
    text = page.read_text()
    named = re.findall(r'(?:src|href)="([^"#]+)"', text)
    assert {"report.js", "report.css", "data/batch.js"} <= set(named)
    for name in named:
        assert name == "data:," or (page.parent / name).is_file()
    assert "connect-src 'none'" in text
    assert "Research use only" in text
    assert "BSD 2-Clause" in (page.parent / "NIIVUE_LICENSE").read_text()


@pytest.mark.parametrize(
    ("choice", "expected"), [("all", 2), ("flagged", 1), ("none", 0)], ids=["all", "flag", "none"]
)
def test_which_cases_open_in_the_viewer(out: Path, choice: str, expected: int) -> None:
    rows = rows_of(out, viewer=choice)
    files = list((out / "report" / "volumes").glob("*.js"))
    assert len(files) == expected == sum(bool(row["volume"]) for row in rows.values())
    for path in files:
        content = read_payload(path)
        assert content["scan"]
        assert content["labels"]
        assert path.stat().st_size < 3_100_000


def test_no_text_of_a_batch_can_be_html(tmp_path: Path) -> None:
    """Names, warnings, messages and columns with HTML, quotes, line breaks and broken Unicode."""
    out = tmp_path / "out"
    add_case(
        out,
        "a",
        warnings=(HOSTILE,),
        columns={HOSTILE: HOSTILE},
        volumes_mm3={HOSTILE: 5.0},
        made_by={"bundle": HOSTILE},
    )
    store(out, record_of(f"{HOSTILE}\udcfc", status="failed", error=HOSTILE, outputs=()))
    page = write_batch_report(out)
    script = (page.parent / "data" / "batch.js").read_bytes()
    assert script.isascii()
    assert not set(b"<>&\n") & set(script.rstrip(b"\n"))
    batch = read_payload(page.parent / "data" / "batch.js")
    assert batch["cases"][0]["message"].startswith("<img src=x onerror=alert(1)>")
    assert r"\xfc" in batch["cases"][0]["case"]
    assert HOSTILE[:9] not in page.read_text()
    # the page builds nodes, and never HTML from text
    for name in ("report.js", "viewer.js", "view.js"):
        code = (ROOT / "pipeline/report/pages" / name).read_text()
        assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", code)


def test_the_records_are_the_truth(out: Path) -> None:
    """Tables that were edited or lost change nothing."""
    before = batch_of(out)
    (out / "volumes.csv").write_text("case,left thalamus\nsub/one,1\n")
    (out / "run.json").unlink(missing_ok=True)
    assert batch_of(out) == before


def test_a_run_that_has_not_ended_is_named(out: Path) -> None:
    """Its cases have no record yet: neither page nor command may look complete."""
    assert batch_of(out)["complete"] is True
    run = OutputFolder(out).runs / "0123.json"
    run.write_text("{}")
    assert batch_of(out)["complete"] is False
    said = CliRunner().invoke(main, ["report", str(out), "--mosaics", "none"])
    assert said.exit_code == 0
    assert "a run is under way in the folder, or was killed" in said.output
    run.unlink()
    said = CliRunner().invoke(main, ["report", str(out), "--mosaics", "none"])
    assert "was killed" not in said.output


def test_two_reports_at_once(out: Path) -> None:
    """With other options: each page is whole, and what the last one names is there."""
    choices: list[dict[str, Any]] = [{"viewer": "all"}, {"viewer": "none"}, {"whole_head": True}]
    with ThreadPoolExecutor(len(choices)) as pool:
        pages = list(
            pool.map(lambda words: write_batch_report(out, options=ReportOptions(**words)), choices)
        )
    rows = read_payload(pages[0].parent / "data" / "batch.js")["cases"]
    assert [row["case"] for row in rows] == ["bad", "sub/one", "sub/two", "worse"]
    for row in rows:
        for folder, name in (("mosaics", row["mosaic"]), ("volumes", row["volume"])):
            found = list((out / "report" / folder).glob(f"{name}*")) if name else []
            assert bool(found) == bool(name)


def test_a_scan_that_is_gone_is_said(out: Path) -> None:
    (out.parent / "scans" / "0.nii.gz").unlink()
    row = rows_of(out)["sub/one"]
    assert "0.nii.gz is gone" in row["picture_problem"]
    assert row["mosaic"] == ""
    assert rows_of(out)["sub/two"]["mosaic"]


def test_a_scan_or_a_label_map_that_was_changed_is_said(out: Path) -> None:
    save(out.parent / "scans" / "0.nii.gz", head(seed=5)[0])
    with open(out / "sub" / "two_seg.nii.gz", "ab") as file:
        file.write(b"x")
    rows = rows_of(out)
    for name in ("sub/one", "sub/two"):
        assert "was changed after the case was segmented" in rows[name]["picture_problem"]


def test_a_scan_with_another_time_is_the_same(out: Path) -> None:
    """Copied by a tool that keeps no times."""
    os.utime(out.parent / "scans" / "0.nii.gz", (1, 1))
    assert rows_of(out)["sub/one"]["picture_problem"] == ""


def test_a_damaged_scan_ends_nothing(out: Path) -> None:
    """A record of bytes that cannot be read: the other cases have their pictures."""
    scan = out.parent / "scans" / "0.nii.gz"
    scan.write_bytes(scan.read_bytes()[:500])
    record = read_record(OutputFolder(out).record("sub/one"))
    assert record is not None
    state = replace(record.inputs[0], size=500, mtime_ns=scan.stat().st_mtime_ns)
    write_record(OutputFolder(out), replace(record, inputs=(state,)))
    rows = rows_of(out)
    assert "cannot be read" in rows["sub/one"]["picture_problem"]
    assert rows["sub/two"]["mosaic"]


def test_pictures_are_drawn_once(out: Path) -> None:
    """A second report keeps them, removes those that no case has, and leaves files of others."""
    first = rows_of(out)
    mosaics = out / "report" / "mosaics"
    mine = mosaics / "notes.webp"
    mine.write_text("mine")
    times = {path: path.stat().st_mtime_ns for path in mosaics.iterdir()}
    time.sleep(0.01)
    record = read_record(OutputFolder(out).record("sub/two"))
    assert record is not None
    OutputFolder(out).record("sub/two").unlink()
    second = rows_of(out)
    assert second["sub/one"]["mosaic"] == first["sub/one"]["mosaic"]
    left = {path: path.stat().st_mtime_ns for path in mosaics.iterdir()}
    assert left.items() <= times.items()
    assert mine in left
    assert len(left) == 3
    assert not list((out / "report" / "volumes").glob("*.js"))


def test_whole_heads_are_other_pictures(out: Path) -> None:
    cut, whole = rows_of(out), rows_of(out, whole_head=True)
    assert cut["sub/one"]["mosaic"] != whole["sub/one"]["mosaic"]


def test_marks_come_back_and_flag(out: Path, tmp_path: Path) -> None:
    """A case that a rater failed can be opened in the viewer; a mark of other labels is dropped."""
    result = rows_of(out)["sub/one"]["result"]
    path = tmp_path / "marks.tsv"
    path.write_text(
        "case\tmark\tnote\tstatus\tresult\n"
        f"sub/one\tfail\tcuts the pole\tdone\t{result}\n"
        "sub/two\tpass\t\tdone\t000000000000\n"
    )
    rows = rows_of(out, marks=read_marks(path))
    assert (rows["sub/one"]["mark"], rows["sub/one"]["note"]) == ("fail", "cuts the pole")
    assert rows["sub/one"]["volume"]
    assert rows["sub/two"]["mark"] == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no marks"),
        ("case,mark,note\na,pass,\n", "holds no marks"),
        ("case\tmark\tnote\na\tgood\t\n", "line 2: mark good, expected pass or fail"),
        (b"case\tmark\tnote\n\xff\tpass\t\n", "cannot be read"),
    ],
)
def test_other_files_are_no_marks(text: str | bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "marks.tsv"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ConfigError, match=message):
        read_marks(path)


def test_quotes_in_notes_are_text(tmp_path: Path) -> None:
    """Those of the page have no quoting: an open quote must not swallow the lines after it."""
    path = tmp_path / "marks.tsv"
    text = 'case\tmark\tnote\r\na\tfail\t"open, schräg\r\nb\tpass\ta "hole"\r\nc\r\n'
    path.write_text(text, encoding="utf-8-sig", newline="")
    marks = {case: (row["mark"], row["note"]) for case, row in read_marks(path).items()}
    assert marks == {
        "a": ("fail", '"open, schräg'),
        "b": ("pass", 'a "hole"'),
        "c": ("", ""),
    }


def test_outliers_are_marked_and_flagged(tmp_path: Path) -> None:
    usual = [record_of(f"c{n}", volumes_mm3={"front": 4000.0 + 40 * n}) for n in range(12)]
    out = store(tmp_path / "out", *usual, record_of("small", volumes_mm3={"front": 400.0}))
    batch = batch_of(out.root)
    flagged = {row["case"]: row["outliers"] for row in batch["cases"] if row["flagged"]}
    assert flagged == {"small": [0]}
    assert batch["structures"][0]["low"] > 400.0


def test_predicted_dice_is_shown_where_a_record_has_one(out: Path) -> None:
    assert all(row["dice"] is None for row in rows_of(out).values())


def test_folders_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "scans").mkdir()
    with pytest.raises(ConfigError, match="no output folder of volseg"):
        write_batch_report(tmp_path / "scans")
    OutputFolder.create(tmp_path / "empty")
    with pytest.raises(ConfigError, match="holds no record of a case"):
        write_batch_report(tmp_path / "empty")


def test_a_file_in_the_place_of_the_report(out: Path) -> None:
    (out / "report").write_text("mine")
    with pytest.raises(WriteError, match="is a file; give another folder by --to"):
        write_batch_report(out)
    assert (out / "report").read_text() == "mine"


def test_the_command(out: Path, tmp_path: Path) -> None:
    """It prints where the page is; errors are one line and exit status 2."""
    runner = CliRunner()
    done = runner.invoke(
        main, ["report", str(out), "--to", str(tmp_path / "r"), "--viewer", "none"]
    )
    assert done.exit_code == 0, done.output
    assert f"the report is {tmp_path / 'r' / 'index.html'}" in done.output
    wrong = runner.invoke(main, ["report", str(tmp_path)])
    assert wrong.exit_code == 2
    assert "no output folder of volseg" in wrong.output


def test_niivue_is_the_pinned_one() -> None:
    """The script that scripts/vendor_niivue copies, unchanged."""
    pinned = re.search(r"script_sha256=(\w+)", (ROOT / "scripts/vendor_niivue").read_text())
    assert pinned is not None
    assert sha256(ROOT / "pipeline/report/pages/niivue.js") == pinned[1]


def test_a_payload_comes_back(tmp_path: Path) -> None:
    content = {"text": HOSTILE, "numbers": [1, 2.5, None, True]}
    path = tmp_path / "x.js"
    path.write_bytes(payload("x", content))
    assert read_payload(path) == content
    path.write_text("alert(1)")
    with pytest.raises(AssertionError):
        read_payload(path)
    with pytest.raises(ValueError, match="not JSON compliant"):
        payload("x", float("nan"))
