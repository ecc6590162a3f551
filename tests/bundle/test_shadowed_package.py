"""A module of the user's own called `pipeline` hides volseg's package from MONAI's command."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("wiring", [["inference"], ["inference", "train"]], ids="+".join)
@pytest.mark.parametrize("name", ["pipeline.py", "pipeline/__init__.py"])
def test_a_hidden_package_is_named(
    name: str, wiring: list[str], tiny_bundle_3d: Path, tmp_path: Path
) -> None:
    """The error names the user's file and what to do; nothing in that file runs."""
    module = tmp_path / name
    module.parent.mkdir(exist_ok=True)
    module.write_text("raise RuntimeError('the user\\'s module ran')\n")
    files = [str(tiny_bundle_3d / "configs" / f"{one}.yaml") for one in wiring]
    options = ["--config_file", str(files), "--bundle_root", str(tiny_bundle_3d)]
    command = [sys.executable, "-W", "ignore", "-m", "monai.bundle", "run", *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"Python finds {module}. Rename that, or run from another folder" in done.stderr
    assert "Traceback" not in done.stderr
