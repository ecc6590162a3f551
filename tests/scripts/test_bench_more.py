"""The other benchmark scripts run on tiny data."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from phantom import make_bundle, nifti, save, smooth

SCRIPTS = Path(__file__).parents[2] / "scripts"
pytestmark = pytest.mark.slow
SMALL = ["--features", "4", "6", "--roi", "16", "16", "16"]


def run(name: str, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / name), *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_memory(tmp_path: Path) -> None:
    """Each number of classes is measured with each limit, and the labels are the same."""
    found = tmp_path / "memory.json"
    sizes = ["--shape", "40", "36", "33", "--classes", "3", "--cases", "0", *SMALL]
    run("bench_memory.py", *sizes, "--limits", "none", "3G", "--json", str(found))
    runs = json.loads(found.read_text())["runs"]
    assert [one["limit"] for one in runs] == ["none", "3G"]
    assert all(
        one["status"] == "done" and one["estimate_gb"] > 0 and one["peak_gb"] > 0 for one in runs
    )
    assert runs[0]["labels"] == runs[1]["labels"] != ""


def test_batch(tmp_path: Path) -> None:
    """Every case is segmented, in float32."""
    pytest.importorskip("openvino")
    found, volume = tmp_path / "batch.json", save(tmp_path / "a.nii.gz")
    sizes = ["--volume", str(volume), "--cases", "2", "--classes", "3", *SMALL]
    run("bench_batch.py", *sizes, "--precisions", "float32", "--json", str(found))
    (one,) = json.loads(found.read_text())["batches"]
    assert one["cases"] == 2
    assert 0 <= one["outside"] <= 1


def test_jobs(tmp_path: Path) -> None:
    """Each number of processes and the default are timed as often as asked."""
    root = make_bundle(tmp_path / "tiny")
    volume = save(tmp_path / "a.nii.gz")
    found = tmp_path / "jobs.json"
    batch = ["--batch", str(volume), str(root)]
    run("bench_jobs.py", *batch, "--rounds", "1", "--json", str(found))
    (result,) = json.loads(found.read_text())["batches"]
    assert result["cases"] == 1
    assert list(result["medians"]) == ["1", "2", "default"]
    assert all(len(seconds) == 1 for seconds in result["seconds"].values())


def test_training_steps(tmp_path: Path) -> None:
    """Both loops train on the same cases."""
    root = make_bundle(tmp_path / "tiny", labels={"background": 0, "front": 7, "back": 300})
    for i in range(3):
        save(tmp_path / "data" / "images" / f"{i}.nii.gz", nifti(smooth(seed=i)))
        save(
            tmp_path / "data" / "labels" / f"{i}.nii.gz",
            nifti((7 * (smooth(seed=i) > 110)).astype(np.uint8)),
        )
    run_file, found = root / "configs" / "run.yaml", tmp_path / "train.json"
    settings = [f"bundle={root}", f"dataset={tmp_path / 'data'}"]
    options = ["--steps", "2", "--rounds", "1", "--json", str(found)]
    run("bench_train.py", str(run_file), *settings, *options)
    result = json.loads(found.read_text())
    assert {len(seconds) for seconds in result["seconds"].values()} == {1}
    assert result["ratio"] > 0
