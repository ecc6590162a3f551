"""Comparison of two output folders: what several processes left, and what one process left."""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.io.tables import read_csv

# columns that depend on the machine's load, and on what happened on the way
VARYING = {"read_s", "preprocess_s", "network_s", "invert_s", "write_s", "peak_memory_mb", "reason"}


def assert_same_results(out: Path, plain: Path) -> None:
    """Label maps are equal byte by byte, tables but for times, memory and reasons."""
    maps = sorted(path.name for path in plain.glob("*_seg.nii.gz"))
    assert maps and maps == sorted(path.name for path in out.glob("*_seg.nii.gz"))
    for name in (*maps, "volumes.csv"):
        assert (out / name).read_bytes() == (plain / name).read_bytes(), name
    rows, expected = (
        [{k: v for k, v in row.items() if k not in VARYING} for row in read_csv(x / "cases.csv")]
        for x in (out, plain)
    )
    assert rows == expected
    run, other = (json.loads((folder / "run.json").read_text()) for folder in (out, plain))
    for key in set(run) - {"command", "started", "ended"}:
        assert run[key] == other[key], key
    # nothing is left of what was under way
    assert not (out / ".volseg" / "begun").exists()
    for name in ("staging", "suspects", "runs"):
        assert not list((out / ".volseg" / name).iterdir()), name
    assert list((out / ".volseg" / "claims").glob("*/*")) == []
