from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from phantom import save

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench.py"


@pytest.mark.slow
def test_the_benchmark_runs(tmp_path: Path) -> None:
    """On a tiny volume every result is there, and the labels agree with MONAI's."""
    pytest.importorskip("openvino")
    volume = save(tmp_path / "a.nii.gz")
    found, page, plot = (tmp_path / f"a.{suffix}" for suffix in ("json", "md", "png"))
    sizes = ["--classes", "3", "--features", "4", "6", "--roi", "16", "16", "16", "--rounds", "1"]
    outputs = ["--json", str(found), "--report", str(page), "--plot", str(plot)]
    tools = ["--volume", str(volume), "--tools", "monai", "float32"]
    command = [sys.executable, str(SCRIPT), *tools, *sizes, *outputs]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
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
