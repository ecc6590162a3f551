"""Time `python -m monai.bundle run` and `volseg segment` on a large volume, one after the other.

    python scripts/bench_bundle.py ZOO wholeBody_ct_segmentation --shape 256 256 192 --spacing 1.5

ZOO is the folder `models` of a checkout of MONAI's model zoo, as for scripts/check_zoo.py, which
makes the random weights and the volume. Each round runs both commands in a process of its own, and
takes wall time and peak memory of the whole command, imports included. volseg runs once before the
rounds: it decides then, once per bundle and processor, which parts it computes by its own means,
and that time is a row of its own. `--without-monai` measures volseg alone, where MONAI does not fit
the machine. `--precision bfloat16` measures volseg's times in bfloat16 too.
"""

from __future__ import annotations

import argparse
import csv
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from check_zoo import (
    HOW,
    How,
    by_monai_command,
    flat,
    lowest_dice,
    make_item,
    make_weights,
    written_by,
)
from numpy.typing import NDArray

PRECISIONS = ("float32", "bfloat16")
KIB_PER_GIB = 2**20  # ru_maxrss is in KiB on Linux
MIB_PER_GIB = 2**10


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A command that ended.

    Attributes:
        seconds: its wall time.
        gib: peak of the memory of its largest process, GiB.
    """

    seconds: float
    gib: float

    def text(self) -> str:
        """Return both as cells of a table."""
        return f"{self.seconds:.1f} | {self.gib:.2f}"


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("zoo", type=Path)
    parser.add_argument("bundle")
    parser.add_argument("--shape", type=int, nargs=3, required=True, help="Of the volume, voxels.")
    parser.add_argument("--spacing", type=float, default=1.5, help="Of the volume, mm.")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--without-monai", action="store_true")
    parser.add_argument("--precision", choices=PRECISIONS, action="append", default=["auto"])
    parser.add_argument("--work", type=Path, default=Path("runs/bench_bundle"))
    arguments = parser.parse_args()
    spacing = (arguments.spacing,) * 3
    how = replace(HOW.get(arguments.bundle, How()), shape=tuple(arguments.shape), spacing=spacing)
    work = arguments.work / arguments.bundle
    shutil.rmtree(work, ignore_errors=True)
    root = work / "bundle"
    shutil.copytree(arguments.zoo / arguments.bundle, root)
    make_weights(root, how)
    item = make_item(root, work / "in", how)
    print("command | wall, s | peak, GiB | lowest Dice with MONAI", flush=True)
    first, _ = volseg(root, item, work / "first", how)
    print(f"volseg, first | {first.text()} |", flush=True)
    for _ in range(arguments.rounds):
        expected = None
        if not arguments.without_monai:
            stock, expected = monai(root, item, work / "monai", how)
            print(f"MONAI | {stock.text()} |", flush=True)
        for precision in arguments.precision:
            own, found = volseg(root, item, work / "volseg", how, precision)
            dice = "" if expected is None else f"{lowest_dice(found, expected):.5f}"
            print(f"volseg, {precision} | {own.text()} | {dice}", flush=True)


def monai(
    root: Path, item: dict[str, Any], output: Path, how: How
) -> tuple[Measured, NDArray[Any]]:
    """Return time and labels of MONAI's command."""
    shutil.rmtree(output, ignore_errors=True)
    command, environment = by_monai_command(root, output, item, how)
    measured = measure(command, output.with_suffix(".log"), cwd=root, environment=environment)
    return measured, written_by(output, item)


def volseg(
    root: Path, item: dict[str, Any], output: Path, how: How, precision: str = "auto"
) -> tuple[Measured, NDArray[Any]]:
    """Return time and labels of volseg's command."""
    shutil.rmtree(output, ignore_errors=True)
    (_, image), *others = flat(item)
    if others:
        raise SystemExit(f"{root.name}: expected a bundle of one file per case")
    command = [sys.executable, "-m", "pipeline.cli", "segment", image, "-o", str(output)]
    command += ["-b", str(root), "--trust", "--device", "cpu", "--precision", precision]
    for override in how.both:
        command += ["--set", override]
    measured = measure(command, output.with_suffix(".log"))
    with (output / "cases.csv").open(newline="") as rows:
        worker = max(float(row["peak_memory_mb"]) for row in csv.DictReader(rows))
    # the kernel does not count a worker that another process started as one of the command's
    measured = replace(measured, gib=max(measured.gib, worker / MIB_PER_GIB))
    return measured, written_by(output, item)


def measure(
    command: Sequence[str],
    log: Path,
    *,
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> Measured:
    """Run a command to its end; what it prints goes into a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    begun = time.perf_counter()
    with log.open("w") as lines:
        process = subprocess.Popen(
            command, cwd=cwd, env=environment, stdout=lines, stderr=subprocess.STDOUT
        )
        # unlike Popen.wait, it gives the memory of this child alone
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"it ended with {process.returncode}: {' '.join(command)}; see {log}")
    return Measured(seconds=time.perf_counter() - begun, gib=usage.ru_maxrss / KIB_PER_GIB)


if __name__ == "__main__":
    main()
