"""scripts/bench_bundle.py, and with it scripts/check_zoo.py's weights, volume and commands."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from phantom import load_script
from zoo_forms import zoo_bundle


@pytest.mark.slow
def test_both_commands_are_timed_and_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A small bundle in the zoo's form, with random weights, on a small oblique volume."""
    zoo_bundle(tmp_path / "zoo" / "json", "json")
    shutil.rmtree(tmp_path / "zoo" / "json" / "models")
    load_script("check_zoo")
    script = load_script("bench_bundle")
    options = [str(tmp_path / "zoo"), "json", "--shape", "40", "36", "31"]
    options += ["--work", str(tmp_path / "work"), "--precision", "float32"]
    monkeypatch.setattr(sys, "argv", ["bench_bundle.py", *options])
    script.main()
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[1:]]
    assert [row[0] for row in rows] == ["volseg, first", "MONAI", "volseg, auto", "volseg, float32"]
    for row in rows:
        assert float(row[1]) > 0
        assert 0.1 < float(row[2].strip(" |")) < 20
    for row in rows[2:]:
        assert float(row[3]) >= 0.999
