"""Measure what a batch of very many cases costs beside the network: files, system calls, seconds.

    python scripts/bench_cluster.py --cases 1000 4000 --json runs/cluster.json
    python scripts/bench_cluster.py --cases 1000 --dask 4

One small volume stands for all cases, and its segmentation, computed once, for that of all. All
else is done in full for each case: claim, reading, preprocessing, label map, record. With two
numbers of cases and with strace, the calls per case are the difference of the two runs.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from pipeline.batch import dask_executor, local_executor, run_batch, write_tables
from pipeline.bundle import open_bundle
from pipeline.inference import Model, Prediction, PreparedCase, predict_case
from pipeline.io import write_json
from pipeline.types import Case

BUNDLE: dict[str, Any] = {"bundle": "hippocampus_mr_3d", "device": "cpu"}
# calls by which a file system learns of names, and those that wait for its disk
CALLS = "trace=%file,fsync,fdatasync,getdents64,flock"


def parse_arguments() -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--cases", type=int, nargs="+", default=[200, 1200], help="Numbers of cases."
    )
    parser.add_argument(
        "--dask", type=int, help="Number of local workers of Dask; none by default."
    )
    parser.add_argument("--folder", type=Path, help="Folder of the results, on the file system.")
    parser.add_argument("--run-only", action="store_true", help="Leave out what follows the run.")
    parser.add_argument("--strace", action="store_true", help="Count system calls per case.")
    parser.add_argument("--json", type=Path, help="Write the results to this file.")
    return parser.parse_args()


def stand_in(prediction: Prediction) -> Callable[[Model, PreparedCase], Prediction]:
    """Return a function that gives the same prediction for every case."""

    def predict(model: Model, prepared: PreparedCase) -> Prediction:
        return prediction

    return predict


def measure(folder: Path, count: int, args: argparse.Namespace) -> dict[str, Any]:
    """Segment cases that are all one volume.

    Returns:
        seconds per case, the largest memory of this process, what lies in the output folder.
    """
    workers = args.dask
    image = folder / "in" / "volume.nii.gz"
    image.parent.mkdir(parents=True, exist_ok=True)
    voxels = np.random.default_rng(0).normal(100, 20, (24, 31, 28)).astype(np.float32)
    nib.save(nib.Nifti1Image(voxels, np.diag([1.0, 1.1, 1.2, 1.0])), image)
    model = open_bundle(**BUNDLE)
    predict = stand_in(predict_case(model, image))
    cases = [Case(case=f"{n % 1000:03d}/sub-{n:07d}", image=str(image)) for n in range(count)]
    out = folder / f"out_{count}"
    executor = local_executor if workers is None else dask_executor("local", BUNDLE, jobs=workers)
    times = []
    begun = time.perf_counter()
    run_batch(
        model,
        cases,
        out,
        executor,
        predict=predict,
        progress=lambda record: times.append(time.perf_counter()),
    )
    whole = time.perf_counter() - begun
    if args.run_only:
        return {"whole_s": whole}
    tables = seconds_of(lambda: write_tables(out))
    again = seconds_of(lambda: run_batch(model, cases, out, local_executor, predict=predict))
    return {
        "cases": count,
        "workers": workers,
        "whole_s": whole,
        "case_ms": 1000 * (times[-1] - times[0]) / (count - 1),
        "tables_ms_per_case": 1000 * tables / count,
        "again_ms_per_case": 1000 * (again - tables) / count,
        "memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        **listing(out),
    }


def seconds_of(action: Callable[[], Any]) -> float:
    """Return the wall time of an action."""
    begun = time.perf_counter()
    action()
    return time.perf_counter() - begun


def listing(out: Path) -> dict[str, float]:
    """Return how many files a batch left per case, and in the fullest folder of its state."""
    files, fullest, size = 0, 0, 0
    for folder, _, names in os.walk(out / ".volseg"):
        files += len(names)
        fullest = max(fullest, len(names))
        size += sum((Path(folder) / name).stat().st_size for name in names)
    return {"state_files": files, "fullest_folder": fullest, "state_bytes": size}


def calls_per_case(counts: list[int], workers: int | None) -> dict[str, float]:
    """Return system calls per case by name: the difference of two runs."""
    few, many = (traced_calls(count, workers) for count in sorted(counts)[:2])
    cases = abs(counts[1] - counts[0])
    each = {name: (many[name] - few.get(name, 0)) / cases for name in many}
    return {name: round(number, 2) for name, number in each.items() if number >= 0.05}


def traced_calls(count: int, workers: int | None) -> dict[str, int]:
    """Return the system calls of a whole run by name."""
    with tempfile.TemporaryDirectory() as name:
        summary = Path(name) / "calls.txt"
        command = [sys.executable, __file__, "--cases", str(count), "--folder", name, "--run-only"]
        if workers is not None:
            command += ["--dask", str(workers)]
        trace = ["strace", "-c", "-f", "-qq", "-e", CALLS, "-o", str(summary)]
        subprocess.run([*trace, *command], check=True, stdout=subprocess.DEVNULL)
        rows = re.findall(
            r"^\s*[\d.]+\s+[\d.]+\s+\d+\s+(\d+)\s+(?:\d+\s+)?(\w+)$", summary.read_text(), re.M
        )
    return {call: int(number) for number, call in rows if call != "total"}


def main() -> None:
    """Measure, and print or write the results."""
    args = parse_arguments()
    results: dict[str, Any] = {"runs": []}
    folder = args.folder or Path(tempfile.mkdtemp())
    try:
        for count in args.cases:
            results["runs"].append(measure(folder, count, args))
            print(results["runs"][-1], flush=True)
    finally:
        if args.folder is None:
            shutil.rmtree(folder)
    if args.strace:
        results["calls_per_case"] = calls_per_case(args.cases, args.dask)
        print(results["calls_per_case"])
    if args.json:
        write_json(args.json, results)


if __name__ == "__main__":
    main()
