from __future__ import annotations

import json
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from batch_folders import record_of
from phantom import make_bundle, nifti, save, smooth

from pipeline.batch import case_worker, tables
from pipeline.batch.case_worker import STEPS
from pipeline.batch.claims import Claims
from pipeline.batch.outputs import OutputFolder
from pipeline.batch.records import CaseRecord, write_record
from pipeline.batch.runner import (
    local_executor,
    pool_executor,
    run_batch,
    run_bundle,
    segment_cases,
)
from pipeline.bundle.opening import open_bundle
from pipeline.bundle.wiring import read_wiring
from pipeline.errors import ConfigError, InterruptedRunError, PipelineError, VolumeError
from pipeline.inference import invert, predictor
from pipeline.inference.case_model import Prediction, PreparedCase
from pipeline.inference.model import Model
from pipeline.inference.predictor import predict_case, predict_prepared
from pipeline.io.cases import find_cases
from pipeline.io.tables import read_csv
from pipeline.types import Case

SMALL = (9, 11, 8)  # one window of the tiny network


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three small good volumes."""
    for i, name in enumerate("abc"):
        save(tmp_path / "in" / f"{name}.nii.gz", nifti(smooth(SMALL, seed=i)))
    return tmp_path


def go(model: Model, folder: Path, **options: Any) -> dict[str, str]:
    rows = segment_cases(model, find_cases([folder / "in"], model.spec), folder / "out", **options)
    return {row.case: row.status for row in rows}


def test_what_segment_leaves(model: Model, folder: Path) -> None:
    """A label map a case, one row an input in cases.csv and volumes.csv, the versions and hashes in
    run.json, nothing else.
    """
    (folder / "in" / "b.nii.gz").write_bytes(b"nothing")
    seen: list[str] = []
    states = go(model, folder, progress=lambda row: seen.append(f"{row.case} {row.status}"))
    assert states == {"a": "done", "b": "failed", "c": "done"}
    assert sorted(seen) == ["a done", "b failed", "c done"]
    out = folder / "out"
    assert {path.name for path in out.iterdir()} == {
        "a_seg.nii.gz",
        "c_seg.nii.gz",
        "cases.csv",
        "volumes.csv",
        "run.json",
        "volseg.log",
        "labels.tsv",
        "labels_itksnap.txt",
        "labels.ctbl",
        "labels_freesurfer.txt",
        ".volseg",
    }
    assert not list((out / ".volseg" / "staging").iterdir())
    assert not list((out / ".volseg" / "runs").iterdir())
    rows = read_csv(out / "cases.csv")
    assert [(row["case"], row["status"], row["input"]) for row in rows] == [
        (name, state, f"{folder}/in/{name}.nii.gz") for name, state in states.items()
    ]
    assert all(float(rows[0][f"{step}_s"]) >= 0 for step in STEPS)
    assert float(rows[0]["peak_memory_mb"]) > 10
    assert rows[1]["read_s"] == ""
    for row in read_csv(out / "volumes.csv"):
        labels = np.asarray(nib.load(out / f"{row['case']}_seg.nii.gz").dataobj)
        for name, value in model.spec.labels.items():
            if value:
                assert float(row[name]) == pytest.approx(
                    (labels == value).sum() * 0.9 * 1.3 * 2.1, rel=1e-5
                )
    record = json.loads((out / "run.json").read_text())
    (versions,) = record["versions"]
    assert set(versions) >= {"volseg", "monai", "torch"}
    assert record["cases"] == {"done": 2, "failed": 1}
    assert len(record["weights_sha256"]) == len(record["spec_sha256"]) == 64
    (computed,) = record["computed"]
    assert (computed["runtime"], computed["precision"]) == ("openvino", "float32")
    assert computed["openvino_version"] and computed["processor"]
    assert computed["device"] == "cpu"


def test_a_run_goes_on_where_it_stopped(model_3d: Model, folder: Path) -> None:
    """What is done is skipped and stays in the tables, what failed or is gone is done again."""
    good = (folder / "in" / "b.nii.gz").read_bytes()
    (folder / "in" / "b.nii.gz").write_bytes(good[:100])
    assert go(model_3d, folder) == {"a": "done", "b": "failed", "c": "done"}
    before = (folder / "out" / "a_seg.nii.gz").stat().st_mtime_ns
    assert go(model_3d, folder) == {"a": "skipped", "b": "failed", "c": "skipped"}
    (folder / "in" / "b.nii.gz").write_bytes(good)
    (folder / "out" / "c_seg.nii.gz").unlink()
    assert go(model_3d, folder) == {"a": "skipped", "b": "done", "c": "done"}
    assert (folder / "out" / "a_seg.nii.gz").stat().st_mtime_ns == before
    assert {row["case"] for row in read_csv(folder / "out" / "volumes.csv")} == {"a", "b", "c"}
    assert all(float(row["network_s"]) >= 0 for row in read_csv(folder / "out" / "cases.csv"))
    assert go(model_3d, folder, overwrite=True) == dict.fromkeys("abc", "done")


@pytest.mark.parametrize(
    ("place", "step"),
    [
        (predictor, "predict_prepared"),
        (case_worker, "write_labels"),
        (case_worker, "write_record"),
        (tables, "write_csv"),
    ],
)
def test_a_killed_run_loses_nothing(
    place: Any, step: str, model_3d: Model, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the second case at any step and started again, the end is that of a run that was
    not stopped.
    """
    original, calls = getattr(place, step), iter(range(100))

    def killed(*arguments: Any, **options: Any) -> Any:
        if next(calls) == 1:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(place, step, killed)
        with pytest.raises(KeyboardInterrupt):
            go(model_3d, folder)
    assert set(go(model_3d, folder).values()) <= {"done", "skipped"}
    other = folder.parent / f"{folder.name}_whole"
    save(other / "x.nii.gz")
    segment_cases(model_3d, find_cases([folder / "in"], model_3d.spec), other / "out")
    for name in ("a_seg.nii.gz", "b_seg.nii.gz", "c_seg.nii.gz", "volumes.csv"):
        assert (folder / "out" / name).read_bytes() == (other / "out" / name).read_bytes()
    assert sorted(p.name for p in (folder / "out").iterdir()) == sorted(
        p.name for p in (other / "out").iterdir()
    )


def test_a_signal_while_it_plans_says_what_remains(model_3d: Model, folder: Path) -> None:
    """The cases that were not looked at yet are not done."""
    assert go(model_3d, folder) == dict.fromkeys("abc", "done")
    cases = find_cases([folder / "in"], model_3d.spec)

    def progress(record: CaseRecord) -> None:
        if record.case == "a":
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(InterruptedRunError, match=r"SIGTERM.; 2 cases are not done; start"):
        run_batch(model_3d, cases, folder / "out", local_executor, progress=progress)


class Thief:
    """Stands for another run that finds this one dead, takes case b over and does it."""

    def __init__(self, out: OutputFolder) -> None:
        self.out, self.calls = out, 0

    def __call__(self, model: Model, prepared: PreparedCase) -> Prediction:
        self.calls += 1
        if self.calls == 2:
            self.out.claim("b").unlink()
            others = Claims(self.out).__enter__()
            others.take("b")

            def finish_later() -> None:
                time.sleep(1)
                write_record(self.out, record_of("b", error="by another run"))
                others.release("b")
                others.__exit__()

            threading.Thread(target=finish_later).start()
        return predict_prepared(model, prepared)


@pytest.mark.parametrize("jobs", [0, 1], ids=["local", "pool"])
def test_a_case_that_another_run_takes_over_is_its_own(
    jobs: int, tiny_bundle_3d: Path, folder: Path
) -> None:
    """This run drops what it computed, waits for the other run, and reports its result."""
    (folder / "in" / "c.nii.gz").unlink()
    out = OutputFolder.create(folder / "out")
    seen: dict[str, CaseRecord] = {}
    run = pool_executor(jobs=1, threads=1, start_method="fork") if jobs else local_executor
    model = open_bundle(tiny_bundle_3d, device="cpu", runtime="torch")
    summary = run_batch(
        model,
        find_cases([folder / "in"], model.spec),
        out.root,
        run,
        progress=lambda record: seen.__setitem__(record.case, record),
        predict=Thief(out),
    )
    assert summary.counts == {"done": 1, "skipped": 1}
    assert seen["b"].error == "by another run"
    assert not (out.root / "b_seg.nii.gz").exists()


FAULTS: list[tuple[BaseException, str]] = [
    (VolumeError("too odd"), "too odd"),
    (MemoryError("Unable to allocate 9 TiB"), r"out of memory \(Unable to allocate 9 TiB\)"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory"),
    (
        ZeroDivisionError("surprise"),
        "unexpected ZeroDivisionError: surprise .a bug of volseg: please report it",
    ),
]


@pytest.mark.parametrize(("fault", "says"), FAULTS, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("step", STEPS)
def test_a_fault_in_any_step_leaves_the_others_written(
    step: str,
    fault: BaseException,
    says: str,
    model_3d: Model,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The second of three cases fails.

    It is recorded with its reason, the two others are whole and their own.
    """
    resampling = model_3d.preprocessing.transforms[2]
    place: dict[str, tuple[Any, str]] = {
        "read": (type(model_3d.preprocessing.reader), "__call__"),
        "preprocess": (type(resampling), "__call__"),
        "network": (model_3d.network, "forward"),
        "invert": (invert, "labels_of_blocks"),
        "write": (case_worker, "write_labels"),
    }
    owner, name = place[step]
    expected = predict_case(model_3d, folder / "in" / "c.nii.gz").labels
    monkeypatch.setattr(owner, name, fails_second(getattr(owner, name), fault))
    assert go(model_3d, folder) == {"a": "done", "b": "failed", "c": "done"}
    assert re.search(says, read_csv(folder / "out" / "cases.csv")[1]["message"])
    assert sorted(path.name for path in (folder / "out").glob("*.nii.gz")) == [
        "a_seg.nii.gz",
        "c_seg.nii.gz",
    ]
    assert [row["case"] for row in read_csv(folder / "out" / "volumes.csv")] == ["a", "c"]
    np.testing.assert_array_equal(
        np.asarray(nib.load(folder / "out" / "c_seg.nii.gz").dataobj), expected
    )


def fails_second(original: Callable[..., Any], fault: BaseException) -> Callable[..., Any]:
    calls = iter((False, True, False))

    def call(*arguments: Any, **options: Any) -> Any:
        if next(calls):
            raise fault
        return original(*arguments, **options)

    return call


@pytest.mark.parametrize("change", ["weights", "labels", "overlap", "volume", "spacing"])
def test_results_of_two_models_are_not_mixed(
    change: str, tiny_bundle_3d: Path, model_3d: Model, folder: Path
) -> None:
    """Other weights, facts or settings are refused; with overwrite the tables start anew."""
    go(model_3d, folder)
    labels = {"background": 0, "only": 1}
    changed: dict[str, Callable[[], Model]] = {
        "weights": lambda: open_bundle(make_bundle(folder / "other", seed=1), device="cpu"),
        "labels": lambda: open_bundle(make_bundle(folder / "other", labels=labels), device="cpu"),
        "overlap": lambda: open_bundle(tiny_bundle_3d, device="cpu", overlap=0.125),
        "volume": lambda: open_bundle(tiny_bundle_3d, device="cpu", volume=0),
        "spacing": lambda: open_bundle(tiny_bundle_3d, device="cpu", labels_spacing=1.5),
    }
    other = changed[change]()
    with pytest.raises(ConfigError, match="holds results of another model or setting"):
        go(other, folder)
    (folder / "in" / "b.nii.gz").unlink()
    assert go(other, folder, overwrite=True) == {"a": "done", "c": "done"}
    assert [row["case"] for row in read_csv(folder / "out" / "cases.csv")] == ["a", "c"]
    assert set(read_csv(folder / "out" / "volumes.csv")[0]) == {
        "case",
        *list(other.spec.labels)[1:],
    }


@pytest.mark.parametrize("content", [None, b"not a NIfTI file"])
def test_a_file_of_others_is_not_replaced(
    content: bytes | None, model_3d: Model, folder: Path
) -> None:
    """Not at the first run nor at the second; overwrite replaces it."""
    path = save(folder / "out" / "b_seg.nii.gz")
    if content is not None:
        path.write_bytes(content)
    before = path.read_bytes()
    for state in ("done", "skipped"):
        assert go(model_3d, folder) == {"a": state, "b": "failed", "c": state}
        assert path.read_bytes() == before
    assert (
        "was not written by volseg; move it away"
        in read_csv(folder / "out" / "cases.csv")[1]["message"]
    )
    assert go(model_3d, folder, overwrite=True)["b"] == "done"
    assert path.read_bytes() != before


def test_run_bundle_fails_after_all_cases(
    model_3d: Model, tiny_bundle_3d: Path, folder: Path
) -> None:
    """The error names each failed case; the others are written, as `segment_cases` writes them."""
    parser = read_wiring(tiny_bundle_3d, ["inference.yaml"])
    parser["device"] = torch.device("cpu")
    parser["dataset"]["data"] = []
    parser.get_parsed_content("initialize")
    evaluator = parser.get_parsed_content("evaluator")
    (folder / "in" / "a.nii.gz").write_bytes(b"")
    cases = find_cases([folder / "in"], model_3d.spec)
    with pytest.raises(
        PipelineError, match=r"1 of 3 cases failed, the others are written:\na: .*the file is empty"
    ):
        run_bundle(evaluator, model_3d, cases, folder / "out")
    written = {path.name: path.read_bytes() for path in (folder / "out").glob("*_seg.nii.gz")}
    assert set(written) == {"b_seg.nii.gz", "c_seg.nii.gz"}
    segment_cases(model_3d, cases, folder / "other")
    for name, content in written.items():
        assert (folder / "other" / name).read_bytes() == content


def test_what_is_left_out_has_a_record_and_no_result(model_3d: Model, folder: Path) -> None:
    """A result that it has is kept while it is true, and goes with --overwrite."""
    out, cases = folder / "out", find_cases([folder / "in"], model_3d.spec)
    segment_cases(model_3d, cases[:2], out)
    given = [cases[0], *(Case(**(case | {"left_out": "no volume: one"})) for case in cases[1:])]

    def states(**options: Any) -> dict[str, str]:
        return {row.case: row.status for row in segment_cases(model_3d, given, out, **options)}

    for _ in range(2):
        assert states() == {"a": "skipped", "b": "skipped", "c": "left out"}
    assert states(overwrite=True) == {"a": "done", "b": "left out", "c": "left out"}
    assert [path.name for path in out.glob("*_seg.nii.gz")] == ["a_seg.nii.gz"]
    rows = {row["case"]: row for row in read_csv(out / "cases.csv")}
    assert rows["b"]["message"] == rows["c"]["message"] == "no volume: one"
    assert [row["case"] for row in read_csv(out / "volumes.csv")] == ["a"]
    segment_cases(model_3d, cases, out)
    rows = {row["case"]: row for row in read_csv(out / "cases.csv")}
    assert (rows["c"]["status"], rows["c"]["reason"]) == ("done", "it was left out before")
