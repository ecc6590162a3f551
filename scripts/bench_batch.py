"""Measure how much of a batch's time is spent outside the network.

    python scripts/bench_batch.py --json runs/batch.json

One volume is segmented as several cases in one process, with the benchmark's network of random
weights and with windows over the foreground only, in each precision. The result is the fraction of
the wall time in which the network did not compute: reading, resampling, inversion and writing, as
far as they do not run while the network computes.
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
from bench import log, make_bundle
from bench_tools import AIR_THRESHOLD

from pipeline.batch import segment_cases
from pipeline.bundle import export_bundle, open_bundle
from pipeline.inference import ready_bytes
from pipeline.io import find_cases, write_json


def parse_arguments() -> argparse.Namespace:
    """Return the parsed command line."""
    data = Path(os.environ.get("VOLSEG_DATA", "."))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--volume",
        type=Path,
        default=data / "real" / "head1mm_T1w.nii.gz",
        help="Segment this NIfTI file.",
    )
    parser.add_argument("--cases", type=int, default=5, help="Number of cases.")
    parser.add_argument("--classes", type=int, default=18, help="Number of classes.")
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
        "--precisions", nargs="+", default=["float32", "int8"], help="Precisions to measure."
    )
    parser.add_argument("--json", type=Path, help="Write the results to this file.")
    return parser.parse_args()


def measure(root: Path, folder: Path, precision: str) -> dict[str, Any]:
    """Segment the scans in `folder`.

    Returns:
        `seconds` of the batch, `network`, the seconds of it in the network, and `outside`, the
        fraction of the rest.
    """
    model = open_bundle(root, device="cpu", precision=precision)
    ready_bytes(model)
    cases = find_cases([folder], model.spec)
    started = time.perf_counter()
    rows = segment_cases(model, cases, folder.parent / f"out_{precision}")
    wall = time.perf_counter() - started
    network = sum(float(row.seconds["network"]) for row in rows)
    return {
        "precision": precision,
        "cases": len(rows),
        "seconds": wall,
        "network": network,
        "outside": 1 - network / wall,
    }


def main() -> None:
    """Measure each precision and write the results."""
    args = parse_arguments()
    with tempfile.TemporaryDirectory() as name:
        root, folder = make_bundle(Path(name) / "bundle", args), Path(name) / "scans"
        path = root / "configs" / "spec.yaml"
        content = yaml.safe_load(path.read_text()) | {"foreground_threshold": AIR_THRESHOLD}
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        folder.mkdir()
        for number in range(args.cases):
            (folder / f"scan_{number}.nii.gz").symlink_to(args.volume.resolve())
        if "int8" in args.precisions:
            export_bundle(root, "openvino", precision="int8", calibrate=[args.volume])
        found = [measure(root, folder, precision) for precision in args.precisions]
    for batch in found:
        log(json.dumps(batch))
    if args.json:
        write_json(args.json, {"batches": found})


if __name__ == "__main__":
    main()
