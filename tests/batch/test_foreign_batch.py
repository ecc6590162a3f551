"""Batches by a bundle in the form of MONAI's model zoo."""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from click.testing import CliRunner
from zoo_forms import by_monai, zoo_bundle, zoo_images

import pipeline
from pipeline.batch.runner import local_executor, pool_executor, run_batch
from pipeline.bundle import open_for_cases
from pipeline.bundle.foreign.engine import ForeignEngine
from pipeline.cli.app import main
from pipeline.errors import ConfigError
from pipeline.inference.openvino_models import CACHE_VARIABLE
from pipeline.io.cases import find_cases
from pipeline.io.tables import read_csv


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A bundle and three cases, one of which is truncated."""
    zoo_bundle(tmp_path / "bundle", "scripts")
    [file] = zoo_images(tmp_path / "in", "scripts")
    for name in ("a", "b"):
        shutil.copy(file, tmp_path / "in" / f"{name}.nii.gz")
    broken = tmp_path / "in" / "b.nii.gz"
    broken.write_bytes(broken.read_bytes()[:-50])
    return tmp_path


def statuses(out: Path) -> dict[str, str]:
    """Case → status, from the table."""
    return {row["case"]: row["status"] for row in read_csv(out / "cases.csv")}


def segment(folder: Path, out: str, **settings: Any) -> None:
    """Segment the cases in two worker processes that are forked."""
    model = open_for_cases(folder / "bundle", device="cpu", trust=True, **settings)
    cases = find_cases([folder / "in"], model)
    run_batch(model, cases, folder / out, pool_executor(jobs=2, threads=1))


@pytest.mark.slow
def test_a_broken_file_among_three(folder: Path) -> None:
    """Two are written and one row says why it failed; mended, only that one is done."""
    segment(folder, "out")
    assert statuses(folder / "out") == {"a": "done", "b": "failed", "c": "done"}
    written = nib.load(folder / "out" / "a_seg.nii.gz")
    source = nib.load(folder / "in" / "a.nii.gz")
    assert np.array_equal(written.affine, source.affine)
    assert written.get_data_dtype() == np.uint8
    assert written.header["sform_code"] == source.header["sform_code"]
    rows = read_csv(folder / "out" / "volumes.csv")
    assert all({"near", "far"} <= row.keys() for row in rows)
    shutil.copy(folder / "in" / "a.nii.gz", folder / "in" / "b.nii.gz")
    before = (folder / "out" / "a_seg.nii.gz").stat().st_mtime_ns
    segment(folder, "out")
    assert set(statuses(folder / "out").values()) == {"done"}
    assert (folder / "out" / "a_seg.nii.gz").stat().st_mtime_ns == before
    runtime = json.loads((folder / "out" / ".volseg" / "runtime.json").read_text())
    assert runtime == {"runtime": "openvino", "precision": "float32"}


@pytest.mark.slow
def test_overrides_and_runtime_are_part_of_the_identity(folder: Path) -> None:
    (folder / "in" / "b.nii.gz").unlink()
    segment(folder, "out", runtime="stock")
    with pytest.raises(ConfigError, match="overrides"):
        segment(folder, "out", runtime="stock", overrides={"inferer::overlap": 0.25})
    shutil.copy(folder / "in" / "a.nii.gz", folder / "in" / "d.nii.gz")
    with pytest.raises(ConfigError, match="--runtime torch was asked for"):
        segment(folder, "out", runtime="torch")
    segment(folder, "out")  # auto follows
    stock = nib.load(folder / "out" / "a_seg.nii.gz")
    assert json.loads((folder / "out" / "run.json").read_text())["computed"]
    segment(folder, "fast")
    fast = nib.load(folder / "fast" / "a_seg.nii.gz")
    assert np.mean(np.asarray(stock.dataobj) == np.asarray(fast.dataobj)) > 0.999


@pytest.mark.slow
def test_files_are_told_by_their_names(tmp_path: Path) -> None:
    """The columns of a manifest and the ends of file names are the names of the bundle's files."""
    root = zoo_bundle(tmp_path / "bundle", "keys")
    files = zoo_images(tmp_path / "in", "keys")
    model = open_for_cases(root, device="cpu", trust=True, runtime="stock")
    [found] = find_cases([tmp_path / "in"], model)
    assert found["case"] == "c"
    assert found["image"] == files
    table = tmp_path / "list.csv"
    table.write_text(f"case,artery,vein,age\nx,{files[0]},{files[1]},7\n")
    [listed] = find_cases([table], model)
    assert listed["image"] == files
    assert model.predict_case(listed["image"]).labels.any()
    (tmp_path / "in" / "c_vein.nii.gz").unlink()
    assert "vein" in find_cases([tmp_path / "in"], model)[0]["problem"]


@pytest.mark.slow
def test_the_python_api(folder: Path) -> None:
    model = pipeline.load(folder / "bundle", device="cpu", trust=True, runtime="stock")
    images = [str(folder / "in" / f"{name}.nii.gz") for name in "abc"]
    results = {result.image: result for result in pipeline.segment_many(model, images, jobs=2)}
    assert results[images[1]].error is not None
    one = results[images[0]].segmentation
    assert one is not None
    assert np.array_equal(one.labels, pipeline.segment(model, images[2]).labels)
    assert set(one.volumes_mm3) == {"near", "far"}


@pytest.mark.slow
def test_the_command(folder: Path) -> None:
    """`--dry-run` foresees what the headers say; without --trust nothing runs."""
    command = ["segment", str(folder / "in"), "-o", str(folder / "out")]
    command += ["-b", str(folder / "bundle"), "--device", "cpu"]
    runner = CliRunner()
    refused = runner.invoke(main, command)
    assert refused.exit_code == 2
    assert "--trust" in refused.stderr
    foreseen = runner.invoke(main, [*command, "--trust", "--dry-run", "--json"])
    rows = json.loads(foreseen.stdout)
    assert [row["case"] for row in rows] == ["a", "b", "c"]
    assert all(int(row["windows"]) > 1 for row in rows)
    changed = [*command, "--trust", "--set", "inferer#overlap=0.25", "--jobs", "1"]
    assert runner.invoke(main, changed).exit_code == 1
    assert statuses(folder / "out") == {"a": "done", "b": "failed", "c": "done"}
    wrong = runner.invoke(main, [*command, "--trust", "--set", "inferrer#overlap=0.25"])
    assert "did you mean inferer" in wrong.stderr


def test_temporary_images_lie_in_the_output_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of files that the bundle cannot read, and parts of them; in the end all are gone."""
    root = zoo_bundle(tmp_path / "bundle", "json")
    [file] = zoo_images(tmp_path / "in", "json")
    image = nib.load(file)
    nib.save(nib.MGHImage(np.asarray(image.dataobj), image.affine), tmp_path / "in" / "m.mgz")
    Path(file).unlink()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "no such folder"))
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    model = open_for_cases(root, device="cpu", trust=True)
    staging = tmp_path / "out" / ".volseg" / "staging"
    seen = []
    run = ForeignEngine._run

    def watched(self: ForeignEngine, item: Any, *arguments: Any) -> Any:
        assert staging in Path(item["image"]).parents
        seen.append(item["image"])
        return run(self, item, *arguments)

    monkeypatch.setattr(ForeignEngine, "_run", watched)
    run_batch(model, find_cases([tmp_path / "in"], model), tmp_path / "out", local_executor)
    assert statuses(tmp_path / "out") == {"m": "done"}
    assert len(seen) == 3  # for the decision both ways, and the case
    del model
    gc.collect()
    assert not list(staging.iterdir())


@pytest.mark.slow
def test_a_killed_worker_leaves_no_images(tmp_path: Path) -> None:
    """They are removed at the end of the run."""
    root = zoo_bundle(tmp_path / "bundle", "scripts")
    script = root / "scripts" / "own.py"
    kill = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    script.write_text(script.read_text().replace("return {", f"{kill}; return {{"))
    [file] = zoo_images(tmp_path / "in", "scripts")
    image = nib.load(file)
    nib.save(nib.MGHImage(np.asarray(image.dataobj), image.affine), tmp_path / "in" / "m.mgz")
    Path(file).unlink()
    model = open_for_cases(root, device="cpu", trust=True, runtime="stock")
    cases = find_cases([tmp_path / "in"], model)
    run_batch(model, cases, tmp_path / "out", pool_executor(jobs=2, threads=1))
    assert statuses(tmp_path / "out") == {"m": "quarantined"}
    assert not list((tmp_path / "out" / ".volseg" / "staging").iterdir())


def same_labels(folder: Path, one: str, other: str) -> None:
    """Check that two output folders hold the same, the failure of the broken file included."""
    for name in (one, other):
        assert statuses(folder / name) == {"a": "done", "b": "failed", "c": "done"}
    for case in "ac":
        found, expected = (
            np.asarray(nib.load(folder / name / f"{case}_seg.nii.gz").dataobj)
            for name in (one, other)
        )
        np.testing.assert_array_equal(found, expected)


def options(folder: Path, out: str) -> list[str]:
    """The options of a command that segments the cases in one process."""
    command = ["segment", str(folder / "in"), "-b", str(folder / "bundle"), "--trust"]
    return [*command, "-o", str(folder / out), "--jobs", "1"]


@pytest.mark.slow
def test_shards_leave_what_one_run_leaves(folder: Path) -> None:
    runner = CliRunner()
    runner.invoke(main, options(folder, "out"))
    for shard in ("1/2", "2/2"):
        runner.invoke(main, [*options(folder, "shards"), "--shard", shard])
    same_labels(folder, "shards", "out")


@pytest.mark.stress
def test_dask_leaves_what_one_run_leaves(folder: Path) -> None:
    pytest.importorskip("distributed")
    runner = CliRunner()
    runner.invoke(main, options(folder, "out"))
    result = runner.invoke(main, [*options(folder, "dask"), "--dask", "local"])
    assert result.exit_code == 1, result.stderr
    same_labels(folder, "dask", "out")


def labelled(root: Path, form: str) -> tuple[list[str], Path]:
    """Write two cases whose references are what MONAI's own run gives, the second all background.

    Returns:
        The arguments of `evaluate` that name the dataset, and its table.
    """
    rows = ["case,image,label"]
    [file] = zoo_images(root / "in", form)
    item = {"image": file}
    labels = by_monai(root / "bundle", item, root / "monai").astype(np.uint8)
    for number, reference in enumerate((labels, np.zeros_like(labels))):
        path = root / f"label_{number}.nii.gz"
        nib.save(nib.Nifti1Image(reference, nib.load(file).affine), path)
        rows.append(f"case_{number},{file},{path}")
    table = root / "cases.csv"
    table.write_text("\n".join(rows) + "\n")
    return ["--trust", "-o", str(root / "out")], table


def test_evaluate_by_the_command(tmp_path: Path) -> None:
    """Against MONAI's own label map, and against one of background only."""
    root = zoo_bundle(tmp_path / "bundle", "json")
    options, table = labelled(tmp_path, "json")
    command = ["evaluate", str(root), str(table), *options]
    refused = CliRunner().invoke(main, [part for part in command if part != "--trust"])
    assert refused.exit_code == 2
    assert "--trust" in refused.stderr
    result = CliRunner().invoke(main, [*command, "--set", "inferer#overlap=0.5"])
    assert result.exit_code == 0, result.stderr
    rows = {(row["case"], row["label"]): row for row in read_csv(tmp_path / "out" / "scores.csv")}
    assert set(rows) == {(f"case_{n}", name) for n in (0, 1) for name in ("near", "far")}
    for name in ("near", "far"):
        assert float(rows["case_0", name]["dice"]) > 0.999
        assert float(rows["case_1", name]["dice"]) == 0
    assert (tmp_path / "out" / "worst.png").is_file()
    result = CliRunner().invoke(main, [*command, "--set", "inferer#overlap=0.25"])
    assert result.exit_code == 2
    assert "overrides" in result.stderr


def test_evaluate_values_without_names(tmp_path: Path) -> None:
    """The metadata name overlapping outputs, which the bundle paints with values of its own."""
    root = zoo_bundle(tmp_path / "bundle", "sigmoid")
    _, table = labelled(tmp_path, "sigmoid")
    model = pipeline.load(root, device="cpu", trust=True, runtime="stock")
    found = pipeline.evaluate(model, table, tmp_path / "out")
    assert {row.label for row in found.scores} == {"label 1", "label 4"}
    assert all(row.score.dice == 1 for row in found.scores if row.case == "case_0")
    assert (tmp_path / "out" / "worst.png").is_file()
