from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "stress_batch.py"


@pytest.mark.slow
def test_the_cost_of_a_batch_is_measured(tmp_path: Path) -> None:
    """All cases are done in both ways, and skipped when the batch is started again."""
    command = [sys.executable, str(SCRIPT), "--cases", "8", "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for way in ("pool", "local"):
        assert found[way]["counts"] == {"done": 8}
        assert found[way]["resume_counts"] == {"skipped": 8}
    assert list(tmp_path.iterdir()) == []
