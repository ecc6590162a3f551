"""The report of a batch: a folder of pages that work offline, from a file:// address."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from pipeline.batch import (
    BatchResults,
    CaseRecord,
    FileState,
    allotted_cores,
    file_problem,
    read_results,
)
from pipeline.bundle import shipped_bundles
from pipeline.config import BundlePaths, load_spec, spec_fingerprint
from pipeline.errors import ConfigError, WriteError, describe_error
from pipeline.io import (
    LabelColor,
    label_table,
    locked,
    printable,
    read_csv,
    write_atomically,
)
from pipeline.report.case_rows import case_rows, label_map, structure_rows
from pipeline.report.mosaic import draw_mosaic, encode_mosaic
from pipeline.report.payload import write_payload
from pipeline.report.shown_volume import shown_volume
from pipeline.report.viewer_volume import viewer_volume

Choice = Literal["all", "flagged", "none"]
FOLDER, INDEX = "report", "index.html"
MOSAICS, VOLUMES, DATA = "mosaics", "volumes", "data"
LOCK = ".lock"  # held while the page is written and pictures are removed
SCAN_ENDING, OUTLINES_ENDING, VOLUME_ENDING = ".webp", "_outlines.webp", ".js"
# To be raised when pictures or volumes of the same files change: older ones are drawn again
DRAWING = 1
KEY_LETTERS = 24  # hexadecimal letters of the name of a picture
KEY = re.compile(rf"[0-9a-f]{{{KEY_LETTERS}}}({OUTLINES_ENDING}|{SCAN_ENDING}|{VOLUME_ENDING})")
PAGES = ("index.html", "report.css", "report.js", "viewer.js", "niivue.js", "NIIVUE_LICENSE")
MARKS = ("pass", "fail", "")


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportOptions:
    """What a report holds.

    Attributes:
        mosaics: which cases have a mosaic.
        viewer: which cases can be opened in the viewer; flagged cases are those with a warning, an
            outlier or the mark `fail`.
        whole_head: whether scans are shown whole; otherwise only near the labels, without the face.
        marks: case → mark and note of a rater, from `read_marks`.
    """

    mosaics: Choice = "all"
    viewer: Choice = "flagged"
    whole_head: bool = False
    marks: Mapping[str, Mapping[str, str]] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pictures:
    """The pictures of one case.

    Attributes:
        mosaic, volume: names of the files without their endings; empty where there are none.
        problem: why there are none.
    """

    mosaic: str = ""
    volume: str = ""
    problem: str = ""

    def add_to(self, row: dict[str, Any]) -> None:
        """Set the columns of a case's row that name its pictures."""
        row["mosaic"], row["volume"] = self.mosaic, self.volume
        row["picture_problem"] = self.problem


def write_batch_report(
    folder: Path,
    output: Path | None = None,
    options: ReportOptions | None = None,
    *,
    threads: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Write the report of an output folder and return the path of its page.

    Pictures of cases that have not changed since an earlier report are kept.

    Args:
        folder: output folder of `volseg segment`.
        output: folder of the report; `report` in the output folder by default.
        options: what it holds.
        threads: that draw; as many as there are cores by default.
        progress: called with the name of each case whose pictures are done.

    Raises:
        ConfigError: the folder holds no results.
        WriteError: the report cannot be written.
    """
    options = options or ReportOptions()
    results = read_results(folder)
    target = output or folder / FOLDER
    cases = case_rows(results, options.marks or {})
    writer = _Writer(results, cases, target, options, _table(results))
    _write_pages(target)  # first, so that a target that cannot be written ends the command at once
    with ThreadPoolExecutor(threads or allotted_cores()) as pool:
        jobs = {
            pool.submit(writer.pictures, number): number for number in range(len(results.records))
        }
        try:
            for job in as_completed(jobs):
                row = cases[jobs[job]]
                job.result().add_to(row)
                if progress is not None:
                    progress(row["case"])
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    with locked(target / LOCK):
        # a report that was written meanwhile, of other options, may have removed pictures
        for number, row in enumerate(cases):
            if row["mosaic"] or row["volume"]:
                writer.pictures(number).add_to(row)
        write_payload(
            target / DATA / "batch.js", "batch", _batch(results, cases, options, writer.table)
        )
        _remove_others(target, cases)
    return target / INDEX


def read_marks(path: Path) -> dict[str, dict[str, str]]:
    """Return the marks of a rater, case → `mark` and `note`, from a TSV file of a report.

    Raises:
        ConfigError: the file cannot be read or is no such table.
    """
    try:
        rows = read_csv(path, delimiter="\t", quotes=False)  # as the page exports it
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as marks of a report ({error})") from error
    if not rows or not {"case", "mark", "note"} <= set(rows[0]):
        raise ConfigError(
            f"{path}: holds no marks; expected a table with tabs and the columns case, mark and "
            "note, as a report exports it"
        )
    marks = {}
    for number, row in enumerate(rows, 2):
        mark = row["mark"] or ""  # editors may remove the tabs of empty cells
        if mark not in MARKS:
            raise ConfigError(f"{path}, line {number}: mark {mark}, expected pass or fail")
        marks[row["case"]] = {
            "mark": mark,
            "note": row["note"] or "",
            "result": row.get("result") or "",
        }
    return marks


class _Writer:
    """Draws the pictures of one batch."""

    def __init__(
        self,
        results: BatchResults,
        rows: Sequence[Mapping[str, Any]],
        target: Path,
        options: ReportOptions,
        table: Sequence[LabelColor],
    ) -> None:
        self.results, self.rows, self.target = results, rows, target
        self.options, self.table = options, table

    def pictures(self, number: int) -> _Pictures:
        """Return the pictures of a case, drawn if they are not there from an earlier report."""
        record, row = self.results.records[number], self.rows[number]
        mosaic, volume = (
            choice == "all" or (choice == "flagged" and row["flagged"])
            for choice in (self.options.mosaics, self.options.viewer)
        )
        labels = label_map(record)
        if labels is None or not record.image or not (mosaic or volume):
            return _Pictures()
        key = self._key(record)
        try:
            return self._draw(record, labels, key if mosaic else "", key if volume else "")
        except WriteError:
            raise
        except Exception as error:  # a picture less must not end the report
            return _Pictures(problem=f"cannot be shown: {printable(describe_error(error))}")

    def _draw(self, record: CaseRecord, labels: FileState, mosaic: str, volume: str) -> _Pictures:
        folders = (self.target / MOSAICS, self.target / VOLUMES)
        scan_file = folders[0] / f"{mosaic}{SCAN_ENDING}"
        outlines_file = folders[0] / f"{mosaic}{OUTLINES_ENDING}"
        volume_file = folders[1] / f"{volume}{VOLUME_ENDING}"
        draw = bool(mosaic) and not (scan_file.is_file() and outlines_file.is_file())
        convert = bool(volume) and not volume_file.is_file()
        if not (draw or convert):
            return _Pictures(mosaic=mosaic, volume=volume)
        for state in (labels, *record.inputs):
            problem = file_problem(self.results.folder, state)
            if problem:
                return _Pictures(problem=f"cannot be shown: {problem}")
        shown = shown_volume(
            Path(record.image[0]),
            self.results.folder / labels.path,
            volume=_volume_number(record),
            whole_head=self.options.whole_head,
        )
        if draw:
            scan, outlines = encode_mosaic(draw_mosaic(shown, self.table))
            write_atomically(outlines_file, outlines)
            write_atomically(scan_file, scan)
        if convert:
            write_payload(volume_file, volume, viewer_volume(shown, self.table))
        return _Pictures(mosaic=mosaic, volume=volume)

    def _key(self, record: CaseRecord) -> str:
        """Return a name that changes with all that a picture depends on."""
        facts = [
            DRAWING,
            self.options.whole_head,
            [(label.name, label.value, label.color) for label in self.table],
            [state.sha256 for state in (*record.inputs, *record.outputs)],
            record.made_by.get("volume"),
        ]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:KEY_LETTERS]


def _volume_number(record: CaseRecord) -> int | None:
    text = record.made_by.get("volume", "")
    return int(text) if text.isdigit() else None


def _table(results: BatchResults) -> list[LabelColor]:
    return label_table(results.labels or _shipped_labels(results.run))


def _shipped_labels(run: Mapping[str, Any]) -> dict[str, int]:
    """Return the labels of the shipped bundle that made the results, if one did."""
    path = BundlePaths(shipped_bundles() / str(run.get("bundle", ""))).spec
    if path.is_file():
        spec = load_spec(path)
        if spec_fingerprint(spec) == run.get("spec_sha256"):
            return spec.labels
    return {}


def _batch(
    results: BatchResults,
    cases: Sequence[Mapping[str, Any]],
    options: ReportOptions,
    table: Sequence[LabelColor],
) -> dict[str, Any]:
    """Return the data of the page."""
    folder = printable(results.folder.resolve())
    return {
        "folder": folder,
        # the marks of this folder are kept under it in the browser, also after a later report
        "id": hashlib.sha256(folder.encode()).hexdigest()[:KEY_LETTERS],
        "whole_head": options.whole_head,
        "viewer": options.viewer,
        "complete": results.is_complete,
        "structures": structure_rows(results, table),
        "cases": cases,
        "run": _printable_texts(results.run),
    }


def _printable_texts(value: Any) -> Any:
    """Return nested data with all texts fit to be shown."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, Mapping):
        return {printable(str(key)): _printable_texts(item) for key, item in value.items()}
    if isinstance(value, Iterable):
        return [_printable_texts(item) for item in value]
    return value


def _write_pages(target: Path) -> None:
    if target.exists() and not target.is_dir():
        raise WriteError(f"{printable(target)}: is a file; give another folder by --to")
    for name, content in page_files():
        path = target / name
        # the viewer's script is the largest part: it is written once
        if not (path.is_file() and path.stat().st_size == len(content)) or name != "niivue.js":
            write_atomically(path, content)


def page_files(names: Sequence[str] = PAGES) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of files that are the same in every report."""
    for name in names:
        yield name, (files("pipeline.report") / "pages" / name).read_bytes()


def _remove_others(target: Path, cases: Sequence[Mapping[str, Any]]) -> None:
    """Remove pictures of an earlier report that no case has any more."""
    wanted = {
        MOSAICS: {f"{row['mosaic']}{end}" for row in cases for end in _MOSAIC_ENDINGS},
        VOLUMES: {f"{row['volume']}{VOLUME_ENDING}" for row in cases},
    }
    for name, kept in wanted.items():
        with suppress(OSError):
            for path in (target / name).iterdir():
                if KEY.fullmatch(path.name) and path.name not in kept:
                    path.unlink()


_MOSAIC_ENDINGS = (SCAN_ENDING, OUTLINES_ENDING)
