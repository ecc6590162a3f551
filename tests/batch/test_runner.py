from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from phantom import make_bundle, nifti, parse_spec, save, smooth

from pipeline.batch import runner as batch
from pipeline.batch.runner import STEPS, run_bundle, segment_cases
from pipeline.bundle.opening import open_bundle
from pipeline.errors import ConfigError, PipelineError, VolumeError
from pipeline.inference import invert
from pipeline.inference.predictor import Model, predict_case
from pipeline.io.cases import find_cases
from pipeline.io.tables import read_csv
from pipeline.io.writer import as_nibabel, write_labels

ONE = parse_spec(3)
TWO = parse_spec(3, channels=["T1w", "FLAIR"])


def tree(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def found(inputs: list[str], spec: Any = ONE) -> dict[str, Any]:
    return {case["case"]: case["image"] for case in find_cases(inputs, spec)}


FILES = (
    "a.nii.gz",
    "sub/b.NII",
    "sub/deep/c.mgz",
    "d.hdr",
    "d.img",
    ".hidden.nii",
    "notes.txt",
    "e.nii.tmp",
    "f.x.nrrd",
)


def test_a_folder_is_searched_with_all_below_it(tmp_path: Path) -> None:
    """Images of every format, under their own relative names; hidden files, other files and halves of pairs are none."""
    root = tree(tmp_path, *FILES)
    assert found([str(root)]) == {
        "a": f"{root}/a.nii.gz",
        "d": f"{root}/d.hdr",
        "f.x": f"{root}/f.x.nrrd",
        "sub/b": f"{root}/sub/b.NII",
        "sub/deep/c": f"{root}/sub/deep/c.mgz",
    }


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("*.nii.gz", {"a"}),
        ("*", {"a", "d", "f.x"}),
        ("**/*.mgz", {"sub/deep/c"}),
        ("s*/*", {"sub/b"}),
        ("sub/[ab].*", {"b"}),
    ],
)
def test_globs(tmp_path: Path, pattern: str, names: set[str]) -> None:
    """A pattern names cases relative to its part without magic."""
    assert set(found([f"{tree(tmp_path, *FILES)}/{pattern}"])) == names


def test_files_are_named_one_by_one(tmp_path: Path) -> None:
    """Also with brackets in the name; both halves of a pair, or one file given twice, are one input."""
    root = tree(tmp_path, *FILES, "g[1].nii")
    inputs = [
        f"{root}/{name}"
        for name in ("d.img", "d.hdr", "a.nii.gz", "a.nii.gz", "g[1].nii", ".hidden.nii")
    ]
    assert found(inputs) == {
        "d": f"{root}/d.hdr",
        "a": f"{root}/a.nii.gz",
        "g[1]": f"{root}/g[1].nii",
        ".hidden": f"{root}/.hidden.nii",
    }


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        (["none.nii"], "none.nii: no such file or folder"),
        (["a.nii.gz", "none.nii"], "none.nii: no such file or folder"),
        (
            ["a.nii.gz", "*.mha"],
            r"\*.mha: no image files there; expected names such as scan.nii.gz",
        ),
        (["empty"], "empty: no image files there"),
        (
            ["a.nii.gz", "twice/a.nii.gz"],
            "1 outputs would be written more than once, a_seg.nii.gz for one, from .*a.nii.gz and .*",
        ),
        (
            ["twice"],
            "a_seg.nii.gz for one, from .*twice/a.mgz and .*twice/a.nii.gz: rename the files",
        ),
    ],
)
def test_inputs_that_cannot_be_are_refused_before_anything_starts(
    tmp_path: Path, inputs: list[str], says: str
) -> None:
    """Missing, empty, or two for one output: named, with what to do."""
    root = tree(tmp_path, "a.nii.gz", "twice/a.nii.gz", "twice/a.mgz", "empty/x.txt")
    with pytest.raises(ConfigError, match=says):
        find_cases([f"{root}/{name}" for name in inputs], ONE)


@pytest.mark.parametrize("endings", [("_T1w", "_FLAIR"), ("_0000", "_0001"), ("_0000", "_FLAIR")])
def test_channels_are_told_by_name_or_number(tmp_path: Path, endings: tuple[str, str]) -> None:
    """One case for the files that differ in their ending, channels in the order of the spec."""
    root = tree(
        tmp_path, *(f"s{i}/sub-{i}{ending}.nii.gz" for i in (1, 2) for ending in reversed(endings))
    )
    expected = {
        f"s{i}/sub-{i}": [f"{root}/s{i}/sub-{i}{ending}.nii.gz" for ending in endings]
        for i in (1, 2)
    }
    assert found([str(root)], TWO) == expected


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (("a_T1w.nii",), "a: no file for channel FLAIR; found .*a_T1w.nii"),
        (
            ("a_T1w.nii", "a_FLAIR.nii", "b.nii"),
            r"b: which channel is it\? Expected a name that ends in one of _T1w, _FLAIR",
        ),
        (("a_T1w.nii", "a_FLAIR.nii", "a_0002.nii"), "a_0002: which channel is it"),
        (
            ("a_T1w.nii", "a_0000.nii", "a_FLAIR.nii"),
            "a: two files for channel T1w, .*a_0000.nii and .*a_T1w.nii; keep one",
        ),
    ],
)
def test_channels_that_do_not_fit_are_refused(
    tmp_path: Path, names: tuple[str, ...], says: str
) -> None:
    """Missing, unknown or given twice."""
    with pytest.raises(ConfigError, match=says):
        find_cases([str(tree(tmp_path, *names))], TWO)


def test_our_own_results_are_no_inputs(tmp_path: Path) -> None:
    """A folder that results went into can be segmented again; a segmentation that others made is an input like any."""
    save(tmp_path / "a.nii.gz")
    write_labels(
        tmp_path / "a_seg.nii.gz", as_nibabel(np.ones((3, 4, 5), dtype=np.uint8), np.eye(4))
    )
    save(tmp_path / "b_seg.nii.gz")
    assert set(found([str(tmp_path)])) == {"a", "b_seg"} == set(found([f"{tmp_path}/*"]))


SMALL = (9, 11, 8)  # one window of the tiny network


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three small good volumes."""
    for i, name in enumerate("abc"):
        save(tmp_path / "in" / f"{name}.nii.gz", nifti(smooth(SMALL, seed=i)))
    return tmp_path


def go(model: Model, folder: Path, **options: Any) -> dict[str, str]:
    rows = segment_cases(model, find_cases([folder / "in"], model.spec), folder / "out", **options)
    return {row["case"]: row["status"] for row in rows}


def test_what_segment_leaves(model: Model, folder: Path) -> None:
    """A label map a case, one row an input in cases.csv and volumes.csv, the versions and hashes in run.json, nothing else."""
    (folder / "in" / "b.nii.gz").write_bytes(b"nothing")
    seen: list[str] = []
    states = go(
        model, folder, progress=lambda case, row: seen.append(f"{case['case']} {row['status']}")
    )
    assert states == {"a": "done", "b": "failed", "c": "done"}
    assert seen == ["a done", "b failed", "c done"]
    out = folder / "out"
    assert {path.name for path in out.iterdir()} == {
        "a_seg.nii.gz",
        "c_seg.nii.gz",
        "cases.csv",
        "volumes.csv",
        "run.json",
    }
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
    told = json.loads((out / "run.json").read_text())
    assert set(told["versions"]) >= {"volseg", "monai", "torch"}
    assert len(told["weights_sha256"]) == len(told["spec_sha256"]) == 64


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


@pytest.mark.parametrize("step", ["predict_prepared", "write_labels", "write_csv"])
def test_a_killed_run_loses_nothing(
    step: str, model_3d: Model, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the second case at any step and started again, the end is that of a run that was not stopped."""
    original, calls = getattr(batch, step), iter(range(100))

    def killed(*arguments: Any) -> Any:
        if next(calls) == (2 if step == "write_csv" else 1):
            raise KeyboardInterrupt
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(batch, step, killed)
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
    """The second of three cases fails: it is recorded with its reason, the two others are whole and their own."""
    steps = model_3d.preprocessing.transforms
    place: dict[str, tuple[Any, str]] = {
        "read": (steps[0], "tensor"),
        "preprocess": (type(steps[2]), "__call__"),
        "network": (model_3d.evaluator.network, "forward"),
        "invert": (invert, "_fill"),
        "write": (batch, "write_labels"),
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


def test_the_bundles_run_fails_after_all_cases(model_3d: Model, folder: Path) -> None:
    """The error names each case that failed; the others are written."""
    (folder / "in" / "a.nii.gz").write_bytes(b"")
    cases = find_cases([folder / "in"], model_3d.spec)
    with pytest.raises(
        PipelineError, match=r"1 of 3 cases failed, the others are written:\na: .*the file is empty"
    ):
        run_bundle(model_3d, cases, folder / "out")
    assert len(list((folder / "out").glob("*_seg.nii.gz"))) == 2
