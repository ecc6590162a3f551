from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from phantom import save

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench.py"


def test_the_benchmark_runs(tmp_path: Path) -> None:
    """On a toy volume: every key is there, and labels agree with MONAI's; how long it takes is not asked."""
    pytest.importorskip("openvino")
    volume, found, page, plot = (
        save(tmp_path / "a.nii.gz"),
        tmp_path / "a.json",
        tmp_path / "a.md",
        tmp_path / "a.png",
    )
    sizes = ["--classes", "3", "--features", "4", "6", "--roi", "16", "16", "16", "--rounds", "1"]
    outputs = ["--json", str(found), "--report", str(page), "--plot", str(plot)]
    command = [
        sys.executable,
        str(SCRIPT),
        "--volume",
        str(volume),
        "--tools",
        "monai",
        "float32",
        *sizes,
        *outputs,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=None)
    assert done.returncode == 0, done.stderr
    results = json.loads(found.read_text())
    assert set(results["speedup_vs_monai"]) == {"float32"}
    assert results["agreement_with_monai"]["float32"]["voxels"] > 0.999
    assert set(results["tools"]["float32"]["steps"]) == {
        "read",
        "preprocess",
        "network",
        "invert",
        "write",
    }
    assert page.read_text().count("\n| ") == 2 + 1
    assert plot.stat().st_size > 1000
