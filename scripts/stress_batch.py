"""Measure what a batch of thousands of cases costs besides its cases.

    python scripts/stress_batch.py --cases 10000 --json runs/stress_batch.json

Reading, network and inversion do nothing, so that what remains is the batch's own work: claims,
hashes, a label map of a few voxels, records and tables. A batch is computed in this process and one
in worker processes; both are then started again when all is done.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import nibabel as nib
import numpy as np
from bench import log, make_bundle

from pipeline.batch import CaseRecord, local_executor, pool_executor, run_batch
from pipeline.bundle import open_bundle
from pipeline.inference import Model, Prediction, PreparedCase
from pipeline.io import find_cases, write_json
from pipeline.types import Case

BLOCK = 1000  # cases whose cost is measured together
SMALL = {"classes": 3, "features": [4, 6], "roi": [16, 16, 16], "overlap": 0.25}


def parse_arguments() -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=10_000, help="Number of cases.")
    parser.add_argument("--jobs", type=int, default=2, help="Number of worker processes.")
    parser.add_argument("--folder", type=Path, help="Make inputs and outputs in this folder.")
    parser.add_argument("--json", type=Path, help="Write the results to this file.")
    return parser.parse_args()


def prepare(model: Model, image: Any) -> PreparedCase:
    """Read nothing."""
    return PreparedCase(case={}, seconds={"read": 0.0, "preprocess": 0.0})


def predict(model: Model, prepared: PreparedCase) -> Prediction:
    """Return a label map of a few voxels."""
    labels = np.zeros((3, 4, 5), np.uint8)
    labels[1] = 1
    return Prediction(
        labels=labels,
        affine=np.eye(4),
        header=b"",
        volumes_mm3={"structure 1": 20.0, "structure 2": 0.0},
        warnings=(),
        seconds=prepared.seconds | {"network": 0.0, "invert": 0.0},
    )


def make_inputs(folder: Path, count: int) -> None:
    """Write small volumes."""
    folder.mkdir(parents=True)
    content = nib.Nifti1Image(np.ones((3, 4, 5), np.uint8), np.diag([2, 3, 4, 1])).to_bytes()
    for number in range(count):
        (folder / f"case_{number:06}.nii").write_bytes(content)


def _resident() -> int:
    """Return the resident memory of this process, bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _written() -> int:
    """Return the bytes that this process has passed to the system to write."""
    for line in Path("/proc/self/io").read_text().splitlines():
        key, value = line.split(": ")
        if key == "wchar":
            return int(value)
    return 0


@dataclass
class Meter:
    """What blocks of cases cost this process.

    Attributes:
        marks: CPU seconds, bytes written and resident bytes at the beginning and after each block.
    """

    marks: list[tuple[float, int, int]] = field(default_factory=list)
    count: int = 0

    def __post_init__(self) -> None:
        self.mark()

    def mark(self) -> None:
        """Note what was used so far."""
        self.marks.append((time.process_time(), _written(), _resident()))

    def progress(self, record: CaseRecord) -> None:
        """Count a case."""
        self.count += 1
        if self.count % BLOCK == 0:
            self.mark()

    def blocks(self) -> dict[str, list[float]]:
        """Return, per block, milliseconds of CPU and bytes per case, and MiB at its end."""
        pairs = list(zip(self.marks, self.marks[1:], strict=False))
        return {
            "cpu_ms": [round((b[0] - a[0]) / BLOCK * 1e3, 3) for a, b in pairs],
            "bytes": [round((b[1] - a[1]) / BLOCK) for a, b in pairs],
            "resident_mb": [round(b[2] / 2**20, 1) for _, b in pairs],
        }


@contextmanager
def nothing_to_read() -> Iterator[None]:
    """Replace the reading of cases; processes that are forked inherit it."""
    with patch("pipeline.inference.predictor.prepare", prepare):
        yield


def measure(model: Model, cases: list[Case], out: Path, executor: Any) -> dict[str, Any]:
    """Compute a batch and start it again; return what it cost."""
    meter, begun = Meter(), time.perf_counter()
    children = os.times()
    summary = run_batch(model, cases, out, executor, progress=meter.progress, predict=predict)
    seconds = time.perf_counter() - begun
    used = os.times()
    workers = used.children_user + used.children_system
    workers -= children.children_user + children.children_system
    again = Meter()
    begun = time.perf_counter()
    resumed = run_batch(model, cases, out, executor, progress=again.progress, predict=predict)
    return {
        "counts": dict(summary.counts),
        "seconds": round(seconds, 1),
        **meter.blocks(),
        "workers_cpu_ms": round(workers / len(cases) * 1e3, 3),
        "resume_counts": dict(resumed.counts),
        "resume_seconds": round(time.perf_counter() - begun, 1),
        "resume_cpu_ms": again.blocks()["cpu_ms"],
    }


def main() -> None:
    """Measure both ways to compute a batch and write the results."""
    args = parse_arguments()
    with tempfile.TemporaryDirectory(dir=args.folder) as name, nothing_to_read():
        folder = Path(name)
        model = open_bundle(
            make_bundle(folder / "bundle", argparse.Namespace(**SMALL)), device="cpu"
        )
        make_inputs(folder / "in", args.cases)
        begun = time.perf_counter()
        cases = find_cases([folder / "in"], model.spec)
        found: dict[str, Any] = {"find_cases_seconds": round(time.perf_counter() - begun, 1)}
        # worker processes first: they are forked, which this process may do without threads only
        pool = pool_executor(jobs=args.jobs, threads=1)
        found["pool"] = measure(model, cases, folder / "pool", pool)
        log(json.dumps(found["pool"]))
        found["local"] = measure(model, cases, folder / "local", local_executor)
        log(json.dumps(found["local"]))
    print(json.dumps(found), file=sys.stdout)
    if args.json:
        write_json(args.json, found)


if __name__ == "__main__":
    main()
