"""The smaller benchmarks run, on toys; what they measure is not asked."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from phantom import save

SCRIPTS = Path(__file__).parent.parent / "scripts"
SMALL = ["--features", "4", "6", "--roi", "16", "16", "16"]


def run(name: str, *arguments: str) -> None:
    done = subprocess.run([sys.executable, str(SCRIPTS / name), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_memory(tmp_path: Path) -> None:
    """Every class count goes by every limit, and the labels are the same."""
    found = tmp_path / "memory.json"
    run("bench_memory.py", "--shape", "40", "36", "33", "--classes", "3", "--limits", "none", "3G", "--cases", "0", *SMALL,
        "--json", str(found))  # fmt: skip
    runs = json.loads(found.read_text())["runs"]
    assert [one["limit"] for one in runs] == ["none", "3G"]
    assert all(one["status"] == "done" and one["estimate_gb"] > 0 and one["peak_gb"] > 0 for one in runs)
    assert runs[0]["labels"] == runs[1]["labels"] != ""


def test_batch(tmp_path: Path) -> None:
    """Every case is done, in float32."""
    pytest.importorskip("openvino")
    found, volume = tmp_path / "batch.json", save(tmp_path / "a.nii.gz")
    run("bench_batch.py", "--volume", str(volume), "--cases", "2", "--classes", "3", "--precisions", "float32", *SMALL,
        "--json", str(found))  # fmt: skip
    (one,) = json.loads(found.read_text())["batches"]
    assert one["cases"] == 2
    assert 0 <= one["outside"] <= 1
