"""Measures memory: a volume of many classes within a limit, the same labels whatever the limit, and no growth over many cases.

    python scripts/bench_memory.py --json runs/memory.json

Each volume is segmented by `volseg segment` in a process of its own; the peak is the kernel's own figure. Where VOLSEG_DATA is
set, 50 crops of the hippocampus are segmented in one process, and the slope of its resident memory is taken.
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


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", type=int, nargs=3, default=[384, 384, 256], help="voxels")
    parser.add_argument("--classes", type=int, nargs="+", default=[100, 18])
    parser.add_argument(
        "--limits",
        nargs="+",
        default=["2G", "4G", "none"],
        help="for --max-memory; a class count goes by all",
    )
    parser.add_argument("--features", type=int, nargs="+", default=[16, 32, 64, 128, 160])
    parser.add_argument("--roi", type=int, nargs=3, default=[96, 96, 96], help="voxels")
    parser.add_argument("--overlap", type=float, default=0.25)
    parser.add_argument("--cases", type=int, default=50, help="crops for the slope")
    parser.add_argument("--json", type=Path, help="writes the results there")
    return parser.parse_args()


def make_volume(path: Path, shape: list[int]) -> Path:
    """Smooth blobs above empty slices, as a head above air; int16, 1 mm."""
    coarse = np.random.default_rng(0).normal(size=[max(2, n // 32) for n in shape])
    array = (
        ndimage.zoom(coarse, [n / c for n, c in zip(shape, coarse.shape, strict=True)], order=1)
        * 200
        + 300
    )
    array[:, :, : shape[2] // 6] = 0
    nib.save(nib.Nifti1Image(array.clip(0).astype(np.int16), np.eye(4)), path)
    return path


def once(root: Path, volume: Path, out: Path, limit: str) -> dict[str, Any]:
    """One run of the command: what became of the case, the peak of its process, and the labels' hash."""
    option = [] if limit == "none" else ["--max-memory", limit]
    command = [
        sys.executable,
        "-m",
        "pipeline.cli",
        "segment",
        str(volume),
        "-o",
        str(out),
        "-b",
        str(root),
        "--device",
        "cpu",
    ]
    done = subprocess.run([*command, *option], capture_output=True, text=True, check=False)
    row = (
        read_csv(out / "cases.csv")[0]
        if (out / "cases.csv").is_file()
        else {"status": "failed", "message": done.stderr}
    )
    labels = out / f"{volume.name.removesuffix('.nii.gz')}_seg.nii.gz"
    return {
        "status": row["status"],
        "message": row["message"],
        "peak_gb": float(row.get("peak_memory_mb") or "nan") / 1024,
        "labels": sha256(labels)[:16] if labels.is_file() else "",
    }


def estimated(root: Path, volume: Path, limit: str) -> float:
    """The peak that the command expects, GB: told by a process of its own, as what is loaded counts."""
    paths = ", ".join(f"pathlib.Path({str(path.resolve())!r})" for path in (root, volume))
    code = f"import bench_memory, pathlib; print(bench_memory.expected({paths}, {limit!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout.strip().splitlines()[-1])


def expected(root: Path, volume: Path, limit: str) -> float:
    """The peak that this process expects for one case, GB."""
    model = open_bundle(root, device="cpu")
    headers = [read_header(volume)]
    if limit == "none":
        return (
            estimate_memory(
                model, headers, ready_bytes(model), model.evaluator.inferer.held_bytes
            ).peak
            / 2**30
        )
    return plan_memory(model, headers, parse_size(limit))[0].peak / 2**30


def slope(crops: list[Path]) -> dict[str, float]:
    """Growth of this process's resident memory over cases, MB a case, after the first ten."""
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
    """Measures, prints, and writes what was asked for."""
    args = arguments()
    found: dict[str, Any] = {"shape": args.shape, "runs": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        volume = make_volume(folder / "volume.nii.gz", args.shape)
        for classes in args.classes:
            root = make_bundle(
                folder / f"bundle_{classes}",
                argparse.Namespace(**{**vars(args), "classes": classes}),
            )
            for limit in args.limits:
                one = once(root, volume, folder / f"out_{classes}_{limit}", limit)
                found["runs"].append(
                    {
                        "classes": classes,
                        "limit": limit,
                        "estimate_gb": estimated(root, volume, limit),
                        **one,
                    }
                )
                print(json.dumps(found["runs"][-1]), flush=True)
    data = os.environ.get("VOLSEG_DATA")
    if data and args.cases:
        crops = sorted((Path(data) / "hippocampus" / "imagesTr").glob("hippocampus_*.nii.gz"))[
            : args.cases
        ]
        found["slope"] = slope(crops)
        print(json.dumps(found["slope"]))
    if args.json:
        write_json(args.json, found)


if __name__ == "__main__":
    main()
