"""Measure the memory of `volseg segment`.

    python scripts/bench_memory.py --json runs/memory.json

A volume of many classes is segmented within several limits, each in a new process: the peak, which
the kernel reports, has to stay below the limit, and the labels have to be the same. If VOLSEG_DATA
is set, 50 crops of the hippocampus are segmented in one process to measure how much its resident
memory grows per case.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from bench import make_bundle
from scipy import ndimage

from pipeline.bundle import open_bundle
from pipeline.inference import (
    estimate_memory,
    parse_size,
    plan_memory,
    predict_case,
    ready_bytes,
    resident_bytes,
)
from pipeline.io import read_csv, read_header, sha256, write_json


def parse_arguments() -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shape", type=int, nargs=3, default=[384, 384, 256], help="Size of the volume in voxels."
    )
    parser.add_argument(
        "--classes", type=int, nargs="+", default=[100, 18], help="Numbers of classes."
    )
    parser.add_argument(
        "--limits",
        nargs="+",
        default=["2G", "4G", "none"],
        help="Values of --max-memory to measure with each number of classes.",
    )
    parser.add_argument(
        "--features",
        type=int,
        nargs="+",
        default=[16, 32, 64, 128, 160],
        help="Channels of each level of the U-Net.",
    )
    parser.add_argument(
        "--roi", type=int, nargs=3, default=[96, 96, 96], help="Window size in voxels."
    )
    parser.add_argument(
        "--overlap", type=float, default=0.25, help="Overlap of windows, as a fraction."
    )
    parser.add_argument(
        "--cases", type=int, default=50, help="Number of crops for the growth of memory."
    )
    parser.add_argument("--json", type=Path, help="Write the results to this file.")
    return parser.parse_args()


def make_volume(path: Path, shape: list[int]) -> Path:
    """Write a volume of smooth blobs with empty slices below, as air below a head; int16, 1 mm."""
    coarse_shape = np.maximum(2, np.array(shape) // 32)
    coarse = np.random.default_rng(0).normal(size=coarse_shape)
    array = 300 + 200 * ndimage.zoom(coarse, np.array(shape) / coarse_shape, order=1)
    array[:, :, : shape[2] // 6] = 0
    nib.save(nib.Nifti1Image(array.clip(0).astype(np.int16), np.eye(4)), path)
    return path


def segment_within(root: Path, volume: Path, out: Path, limit: str) -> dict[str, Any]:
    """Segment a volume with the command.

    Returns:
        The case's `status` and `message`, `peak_gb` of the process, and the first digits of the
        label map's hash as `labels`.
    """
    option = [] if limit == "none" else ["--max-memory", limit]
    segment = ["segment", str(volume), "-o", str(out), "-b", str(root), "--device", "cpu"]
    command = [sys.executable, "-m", "pipeline.cli", *segment, *option]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    row = {"status": "failed", "message": done.stderr}
    if (out / "cases.csv").is_file():
        row = read_csv(out / "cases.csv")[0]
    labels = out / f"{volume.name.removesuffix('.nii.gz')}_seg.nii.gz"
    return {
        "status": row["status"],
        "message": row["message"],
        "peak_gb": float(row.get("peak_memory_mb") or "nan") / 1024,
        "labels": sha256(labels)[:16] if labels.is_file() else "",
    }


def estimate_in_new_process(root: Path, volume: Path, limit: str) -> float:
    """Return the peak that the command estimates, GB.

    What a process has loaded counts, so that this process would estimate another peak.
    """
    paths = ", ".join(f"pathlib.Path({str(path.resolve())!r})" for path in (root, volume))
    code = f"import bench_memory, pathlib; print(bench_memory.estimate({paths}, {limit!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout.strip().splitlines()[-1])


def estimate(root: Path, volume: Path, limit: str) -> float:
    """Return the peak of this process that volseg estimates for one case, GB."""
    max_memory = None if limit == "none" else parse_size(limit)
    model = open_bundle(root, device="cpu", max_memory=max_memory)
    headers = [read_header(volume)]
    allowed = plan_memory(model, headers)
    return estimate_memory(model, headers, ready_bytes(model), allowed).peak / 2**30


def memory_growth(crops: list[Path]) -> dict[str, float]:
    """Return how much this process's resident memory grows, MB per case.

    The first ten cases are left out: the allocator reaches its size with them.
    """
    model = open_bundle("hippocampus_mr_3d", device="cpu")
    held = []
    for crop in crops:
        predict_case(model, crop)
        held.append(resident_bytes() / 2**20)
    settled = held[10:]
    return {
        "mb_a_case": float(np.polyfit(range(len(settled)), settled, 1)[0]),
        "first_mb": settled[0],
        "last_mb": settled[-1],
    }


def main() -> None:
    """Measure, print each result and write them."""
    args = parse_arguments()
    found: dict[str, Any] = {"shape": args.shape, "runs": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        volume = make_volume(folder / "volume.nii.gz", args.shape)
        for classes in args.classes:
            settings = argparse.Namespace(**vars(args) | {"classes": classes})
            root = make_bundle(folder / f"bundle_{classes}", settings)
            for limit in args.limits:
                run = {
                    "classes": classes,
                    "limit": limit,
                    "estimate_gb": estimate_in_new_process(root, volume, limit),
                    **segment_within(root, volume, folder / f"out_{classes}_{limit}", limit),
                }
                found["runs"].append(run)
                print(json.dumps(run), flush=True)
    data = os.environ.get("VOLSEG_DATA")
    if data and args.cases:
        crops = sorted((Path(data) / "hippocampus" / "imagesTr").glob("hippocampus_*.nii.gz"))
        found["slope"] = memory_growth(crops[: args.cases])
        print(json.dumps(found["slope"]))
    if args.json:
        write_json(args.json, found)


if __name__ == "__main__":
    main()
