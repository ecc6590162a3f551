"""Compare numbers of worker processes, and the default, on a batch.

    python scripts/bench_jobs.py FOLDER --bundle brain_mr_structures --jobs 1 2 -o runs/bench_jobs

Each round runs `volseg segment FOLDER` once with each `--jobs`, in turn, and once without it. The
time is that of the whole command, with its imports.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from pipeline.io import write_json

DEFAULT = "default"


def parse_arguments() -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("inputs", type=Path, nargs="+", help="Files or folders to segment.")
    parser.add_argument("--bundle", required=True, help="Bundle to segment with.")
    parser.add_argument("--jobs", type=int, nargs="+", default=[1, 2], help="Numbers to compare.")
    parser.add_argument("--rounds", type=int, default=3, help="Runs of each.")
    parser.add_argument("-o", "--output", type=Path, required=True, help="Folder to work in.")
    return parser.parse_args()


def seconds_of(args: argparse.Namespace, jobs: str) -> float:
    """Return the wall time in seconds of one run of the command with `jobs` processes."""
    output = args.output / f"jobs_{jobs}"
    shutil.rmtree(output, ignore_errors=True)
    command = [sys.executable, "-m", "pipeline.cli", "segment", *map(str, args.inputs)]
    command += ["--bundle", args.bundle, "-o", str(output), "-q"]
    command += [] if jobs == DEFAULT else ["--jobs", jobs]
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> None:
    """Time each number of processes and write the medians and their ratios."""
    args = parse_arguments()
    args.output.mkdir(parents=True, exist_ok=True)
    choices = [*map(str, args.jobs), DEFAULT]
    seconds: dict[str, list[float]] = {jobs: [] for jobs in choices}
    for number in range(args.rounds):
        turn = number % len(choices)
        for jobs in choices[turn:] + choices[:turn]:  # another one is the first in each round
            seconds[jobs].append(seconds_of(args, jobs))
            print(f"round {number + 1}: --jobs {jobs}: {seconds[jobs][-1]:.1f} s", flush=True)
    first = statistics.median(seconds[choices[0]])
    results = [
        {
            "jobs": jobs,
            "seconds": [round(value, 2) for value in seconds[jobs]],
            "median": round(statistics.median(seconds[jobs]), 2),
            "times_as_fast": round(first / statistics.median(seconds[jobs]), 3),
        }
        for jobs in choices
    ]
    for result in results:
        print(json.dumps(result))
    write_json(args.output / "jobs.json", {"results": results})


if __name__ == "__main__":
    main()
