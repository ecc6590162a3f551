"""Measures what a batch takes beside the network: reading, resampling, inversion and writing, hidden behind it or not.

    python scripts/bench_batch.py --json runs/batch.json

Segments a volume several times as so many cases, in one process, with the benchmark's network of random weights and its air
left out, in each precision; the figure is the share of the wall time in which the network did not compute.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from bench import make_bundle, say
from bench_tools import AIR

from pipeline.batch import segment_cases
from pipeline.bundle import export_bundle, open_bundle
from pipeline.inference import ready_bytes
from pipeline.io import find_cases, write_json


def arguments() -> argparse.Namespace:
    """What the command line says."""
    data = Path(os.environ.get("VOLSEG_DATA", "."))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--volume", type=Path, default=data / "real" / "head1mm_T1w.nii.gz", help="a NIfTI file"
    )
    parser.add_argument("--cases", type=int, default=5)
    parser.add_argument("--classes", type=int, default=18)
    parser.add_argument("--features", type=int, nargs="+", default=[16, 32, 64, 128, 160])
    parser.add_argument("--roi", type=int, nargs=3, default=[96, 96, 96], help="voxels")
    parser.add_argument("--overlap", type=float, default=0.25)
    parser.add_argument("--precisions", nargs="+", default=["float32", "int8"])
    parser.add_argument("--json", type=Path, help="writes the results there")
    return parser.parse_args()


def measured(root: Path, folder: Path, precision: str) -> dict[str, Any]:
    """Wall seconds of the batch, those of the network, and the share of the rest."""
    model = open_bundle(root, device="cpu", precision=precision)
    ready_bytes(model)
    cases = find_cases([folder], model.spec)
    started = time.perf_counter()
    rows = segment_cases(model, cases, folder.parent / f"out_{precision}")
    wall = time.perf_counter() - started
    network = sum(float(row["network_s"]) for row in rows)
    return {
        "precision": precision,
        "cases": len(rows),
        "seconds": wall,
        "network": network,
        "outside": 1 - network / wall,
    }


def main() -> None:
    """Measures, and writes what was asked for."""
    args = arguments()
    with tempfile.TemporaryDirectory() as name:
        root, folder = make_bundle(Path(name) / "bundle", args), Path(name) / "scans"
        path = root / "configs" / "spec.yaml"
        path.write_text(
            yaml.safe_dump(
                yaml.safe_load(path.read_text()) | {"foreground_threshold": AIR}, sort_keys=False
            )
        )
        folder.mkdir()
        for number in range(args.cases):
            (folder / f"scan_{number}.nii.gz").symlink_to(args.volume.resolve())
        if "int8" in args.precisions:
            export_bundle(root, "openvino", precision="int8", calibrate=[args.volume])
        found = [measured(root, folder, precision) for precision in args.precisions]
    for one in found:
        say(json.dumps(one))
    if args.json:
        write_json(args.json, {"batches": found})


if __name__ == "__main__":
    main()
