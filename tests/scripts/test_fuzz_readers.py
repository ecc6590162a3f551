"""Damaged files: the readers give an image or a PipelineError, within bounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from phantom import load_script


@pytest.fixture(scope="module")
def script() -> Any:
    """The script as a module."""
    return load_script("fuzz_readers")


@pytest.mark.slow
def test_200_damaged_files(script: Any, tmp_path: Path) -> None:
    """No violation is found."""
    assert script.fuzz(200, 7, tmp_path) == []


@pytest.mark.stress
def test_20000_damaged_files(script: Any, tmp_path: Path) -> None:
    """No violation is found; takes minutes."""
    assert script.fuzz(20_000, 8, tmp_path) == []


def test_a_violation_is_found(script: Any) -> None:
    """Each kind has its own sentence."""
    value = {"shape": [2, 3, 4], "affine": "00", "warnings": [], "bytes": 24, "voxels": 24}
    good = {"header": {"value": value}, "read": {"value": value}, "growth": 0}
    files = {"a.nii": bytes(400)}

    def found(**changes: Any) -> list[str]:
        return list(script.violations({**good, **changes}, files))

    assert found() == []
    assert found(dead="hangs") == ["hangs"]
    assert found(read={"bug": "KeyError", "text": "KeyError(3)"}) == ["read raises KeyError(3)"]
    refused = {"error": "ReadError", "text": "truncated"}
    assert found(header=refused) == ["only the header is refused: truncated"]
    other = {"error": "VolumeError", "text": "colours"}
    assert found(header=refused, read=other) == ["two errors: truncated and colours"]
    assert found(read={"value": {**value, "affine": "01"}}) == ["affine: 00 in the header, 01 read"]
    assert found(growth=65 * 2**20) == [f"takes {65 * 2**20} bytes for 24 declared, 400 unpacked"]


def test_mutations_are_drawn_by_the_seed(script: Any) -> None:
    """The same seed gives the same files."""
    pool = script.samples()
    assert len({sample.name for sample in pool}) == 7
    first, same, other = (script.Mutation(seed, pool) for seed in (3, 3, 4))
    cases = [[mutation.case()[0::2] for _ in range(20)] for mutation in (first, same, other)]
    assert cases[0] == cases[1] != cases[2]
