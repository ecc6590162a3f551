"""Compare numbers of worker processes, and the default, on batches.

    python scripts/bench_jobs.py --batch FOLDER BUNDLE --batch FOLDER BUNDLE --json runs/jobs.json

Each round runs `volseg segment FOLDER --bundle BUNDLE` once with each `--jobs`, in turn, and once
without it. The time is that of the whole command, with its imports.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench import log

from pipeline.io import write_json

DEFAULT = "default"


def parse_arguments() -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--batch",
        nargs=2,
        action="append",
        required=True,
        metavar=("INPUT", "BUNDLE"),
        help="File or folder to segment, and the bundle to segment it with. Can be repeated.",
    )
    parser.add_argument("--jobs", type=int, nargs="+", default=[1, 2], help="Numbers to compare.")
    parser.add_argument("--rounds", type=int, default=3, help="Runs of each.")
    parser.add_argument("--json", type=Path, help="Write the results to this file.")
    return parser.parse_args()


def run_once(source: str, bundle: str, jobs: str) -> tuple[float, int]:
    """Return the wall time of one run of the command, in seconds, and the number of its cases."""
    with tempfile.TemporaryDirectory() as output:
        command = [sys.executable, "-m", "pipeline.cli", "segment", source, "--bundle", bundle]
        command += ["-o", output, "-q"]
        command += [] if jobs == DEFAULT else ["--jobs", jobs]
        started = time.perf_counter()
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        seconds = time.perf_counter() - started
        return seconds, len(list(Path(output).rglob("*_seg.nii.gz")))


def measure(source: str, bundle: str, args: argparse.Namespace) -> dict[str, Any]:
    """Return the times of one batch for each number of processes, and their medians."""
    choices = [*map(str, args.jobs), DEFAULT]
    seconds: dict[str, list[float]] = {jobs: [] for jobs in choices}
    cases = 0
    for number in range(args.rounds):
        turn = number % len(choices)
        for jobs in choices[turn:] + choices[:turn]:  # another one is the first in each round
            taken, cases = run_once(source, bundle, jobs)
            seconds[jobs].append(taken)
            log(f"{bundle}, round {number + 1}: --jobs {jobs}: {taken:.1f} s")
    medians = {jobs: statistics.median(taken) for jobs, taken in seconds.items()}
    return {
        "bundle": Path(bundle).name,
        "cases": cases,
        "rounds": args.rounds,
        "seconds": seconds,
        "medians": medians,
    }


def main() -> None:
    """Measure each batch and write the results."""
    args = parse_arguments()
    batches = [measure(source, bundle, args) for source, bundle in args.batch]
    for batch in batches:
        log(json.dumps(batch))
    if args.json:
        write_json(args.json, {"batches": batches})


if __name__ == "__main__":
    main()
