"""Compare the speed of volseg to MONAI's bundle path and nnU-Net's predictor.

All tools use the same network and volume. Each round runs every tool once, from file to file, in a
new process; ratios are ratios of medians. Without --bundle the network has random weights: times do
not depend on the weights, but the agreement of labels means more with a trained bundle.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import nibabel as nib
import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from torch.utils.flop_counter import FlopCounterMode

from pipeline.bundle import export_bundle, find_bundle, refresh_bundle
from pipeline.config import load_spec
from pipeline.inference import window_grid
from pipeline.io import write_atomically, write_json
from pipeline.networks import build_network, save_weights

SCRIPTS = Path(__file__).parent
CARD = {
    "name": "Benchmark",
    "description": "Random weights for timing.",
    "task": "none",
    "authors": "scripts/bench",
    "copyright": "none",
    "intended_use": "timing",
    "data_source": "none",
    "data_type": "none",
    "references": [],
    "eval_metrics": {},
    "changelog": {"0.0.0": "made for a benchmark"},
}
# Processor instructions that decide which precision is fast.
INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "avx512_bf16")


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
    parser.add_argument("--bundle", help="Use this trained bundle instead of random weights.")
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
        "--tools",
        nargs="+",
        default=["monai", "float32", "int8", "float32 own plan", "int8 own plan"],
        help="Tools to time, by their names in scripts/bench_tools.py.",
    )
    parser.add_argument(
        "--nnunet-python",
        help="Also time nnU-Net, with the Python of an environment with nnunetv2 and volseg.",
    )
    parser.add_argument("--rounds", type=int, default=3, help="Runs of each tool.")
    parser.add_argument("--json", type=Path, help="Write the results to this file.")
    parser.add_argument("--plot", type=Path, help="Draw the results into this PNG file.")
    parser.add_argument("--report", type=Path, help="Write the results as a Markdown page.")
    parser.add_argument(
        "--from-json",
        type=Path,
        help="Report results written by --json earlier instead of measuring.",
    )
    parser.add_argument(
        "--memory", type=Path, help="Add results of scripts/bench_memory.py to the page."
    )
    parser.add_argument(
        "--batch", type=Path, help="Add results of scripts/bench_batch.py to the page."
    )
    parser.add_argument(
        "--jobs", type=Path, help="Add results of scripts/bench_jobs.py to the page."
    )
    parser.add_argument(
        "--int8", type=Path, help="Add results of scripts/bench_int8.py to the page."
    )
    return parser.parse_args()


def make_bundle(folder: Path, args: argparse.Namespace) -> Path:
    """Make a bundle with random weights and return its folder."""
    configs = folder / "configs"
    configs.mkdir(parents=True)
    content = {
        "labels": {"background": 0} | {f"structure {i}": i for i in range(1, args.classes)},
        "channels": ["T1w"],
        "spacing": [1.0, 1.0, 1.0],
        "roi_size": args.roi,
        "overlap": args.overlap,
        "network": {"features": args.features, "norm": "batch"},
    }
    (configs / "spec.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    (configs / "card.yaml").write_text(yaml.safe_dump(CARD))
    torch.manual_seed(0)
    save_weights(build_network(load_spec(configs / "spec.yaml")), folder / "models" / "model.pt")
    refresh_bundle(folder)
    return folder


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Run every tool in every round and return the content of the JSON file."""
    tools = [*args.tools, *(["nnunet"] if args.nnunet_python else [])]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        root = find_bundle(args.bundle) if args.bundle else make_bundle(folder / "bundle", args)
        needs_int8 = any("int8" in tool for tool in tools)
        if needs_int8 and not (root / "models" / "model_int8.xml").is_file():
            log("calibrating int8 on the volume")
            export_bundle(root, "openvino", precision="int8", calibrate=[args.volume])
        runs: dict[str, list[dict[str, Any]]] = {tool: [] for tool in tools}
        sgemm = []
        for number in range(args.rounds):
            sgemm.append(sgemm_gflops())
            for tool in tools:
                python = args.nnunet_python if tool == "nnunet" else sys.executable
                run = run_tool(python, tool, root, args.volume, label_file(folder, tool))
                runs[tool].append(run)
                log(f"round {number + 1} of {args.rounds}: {tool}: {run['seconds']:.1f} s")
        results = {tool: summarise_rounds(rounds) for tool, rounds in runs.items()}
        compared = [tool for tool in tools if tool != "monai"] if "monai" in tools else []
        agreement = {tool: agreement_with_monai(folder, tool) for tool in compared}
        return collect_results(args, root, results, agreement, median(sgemm))


def label_file(folder: Path, tool: str) -> Path:
    """Return the path of the label map that a tool writes."""
    return folder / f"{tool.replace(' ', '_')}.nii.gz"


def run_tool(python: str, tool: str, root: Path, volume: Path, out: Path) -> dict[str, Any]:
    """Run one tool in a new process and return what bench_tools.py printed."""
    # nnU-Net warns where its three folders are not set, although nothing is read from them.
    scratch = str(out.parent / "nnunet")
    environment = (
        os.environ
        | {"PYTHONPATH": str(SCRIPTS.parent)}
        | dict.fromkeys(("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"), scratch)
    )
    command = [python, str(SCRIPTS / "bench_tools.py"), tool, str(root), str(volume), str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{tool} failed:\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def summarise_rounds(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return medians over one tool's rounds, and the seconds of every round."""
    steps = {step: median(run["steps"][step] for run in runs) for step in runs[0]["steps"]}
    return {
        "seconds": median(run["seconds"] for run in runs),
        "rounds": [run["seconds"] for run in runs],
        "peak_mb": median(run["peak_mb"] for run in runs),
        "steps": steps,
    }


def agreement_with_monai(folder: Path, tool: str) -> dict[str, float]:
    """Compare a tool's label map to MONAI's.

    Returns:
        `voxels`, the fraction of voxels with the same label, and `dice`, the mean Dice over the
        labels that MONAI's map has.
    """
    theirs = read_labels(label_file(folder, "monai"))
    ours = read_labels(label_file(folder, tool))
    count = int(max(theirs.max(), ours.max())) + 1
    common = np.bincount(theirs[ours == theirs], minlength=count)
    sizes = np.bincount(ours, minlength=count) + np.bincount(theirs, minlength=count)
    found = np.unique(theirs[theirs > 0])
    return {
        "voxels": float((ours == theirs).mean()),
        "dice": float((2 * common[found] / np.maximum(sizes[found], 1)).mean()),
    }


def read_labels(path: Path) -> NDArray[np.int64]:
    """Return the voxels of a label map as one row of integers."""
    return np.asarray(nib.load(path).dataobj).astype(np.int64).ravel()


def collect_results(
    args: argparse.Namespace,
    root: Path,
    results: dict[str, Any],
    agreement: dict[str, Any],
    sgemm: float,
) -> dict[str, Any]:
    """Return the content of the JSON file."""
    spec = load_spec(root / "configs" / "spec.yaml")
    # A volume smaller than a window is padded to it.
    shape = [int(n) for n in np.maximum(nib.load(args.volume).shape[:3], spec.roi_size)]
    starts = window_grid(shape, spec.roi_size, spec.overlap).starts
    windows = math.prod(len(along_axis) for along_axis in starts)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        build_network(spec).eval()(torch.zeros(1, len(spec.channels), *spec.roi_size))
    work = counter.get_total_flops() * windows / 1e9
    for tool, found in results.items():
        # With its own plan volseg computes fewer windows than were counted here.
        if "network" in found["steps"] and "own plan" not in tool:
            found["gflops"] = work / found["steps"]["network"]

    return {
        "speedup_vs_monai": speedups(results, "monai"),
        "speedup_vs_nnunet": speedups(results, "nnunet"),
        "agreement_with_monai": agreement,
        "tools": results,
        "windows": windows,
        "network_gflop": work / windows,
        "sgemm_gflops": sgemm,
        "volume": {"name": args.volume.name, "shape": shape},
        "spec": {
            "bundle": args.bundle or "random weights",
            "classes": len(spec.labels),
            "features": spec.network.features,
        },
        "machine": {
            "processor": describe_processor(),
            "threads": torch.get_num_threads(),
            "system": platform.platform(terse=True),
        },
        "versions": {name: version(name) for name in ("volseg", "monai", "torch", "openvino")},
    }


def speedups(results: dict[str, Any], base: str) -> dict[str, float]:
    """Return how many times as fast as the tool `base` each of volseg's tools is."""
    if base not in results:
        return {}
    ours = {tool: found for tool, found in results.items() if tool not in ("monai", "nnunet")}
    return {tool: results[base]["seconds"] / found["seconds"] for tool, found in ours.items()}


def sgemm_gflops() -> float:
    """Return the speed of a product of two float32 matrices on this machine, GFLOP/s."""
    a, n = torch.randn(2048, 2048), 5
    a @ a
    started = time.perf_counter()
    for _ in range(n):
        a @ a
    return 2 * 2048**3 * n / (time.perf_counter() - started) / 1e9


def describe_processor() -> str:
    """Return the processor's name and those of its instructions that matter here."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    flags = next((line for line in lines if line.startswith("flags")), "")
    known = [flag for flag in INSTRUCTIONS if f" {flag}" in flags]
    return f"{name} ({', '.join(known)})"


def memory_section(found: dict[str, Any]) -> list[str]:
    """Return the results of scripts/bench_memory.py as lines of Markdown."""
    shape = " × ".join(map(str, found["shape"]))
    lines = [
        "",
        "## Memory",
        "",
        f"`python scripts/bench_memory.py`: a volume of {shape} voxels, `volseg segment` in its "
        "own process.",
        "",
        "| classes | --max-memory | estimate, GB | peak, GB | labels |",
        "|---|---|---|---|---|",
    ]
    for run in found["runs"]:
        peak = f"{run['peak_gb']:.2f}" if run["status"] == "done" else "refused before it starts"
        estimate = f"{run['estimate_gb']:.2f}"
        lines.append(table_row([run["classes"], run["limit"], estimate, peak, run["labels"]]))
    lines += [
        "",
        "The column `labels` has the first digits of the SHA-256 of the label map's file.",
    ]
    if "slope" in found:
        slope = found["slope"]["mb_a_case"]
        lines.append(
            f"Over many cases in one process, resident memory grows by {slope:.2f} MB per case."
        )
    return lines


def int8_section(found: dict[str, Any]) -> list[str]:
    """Return the results of scripts/bench_int8.py as lines of Markdown."""
    dice = ", ".join(f"{name} {value:.4f}" for name, value in found["dice"].items())
    return [
        "",
        "## Accuracy of int8",
        "",
        f"`python scripts/bench_int8.py hippocampus_mr_3d …`: {found['cases']} validation cases, "
        "quantised on training cases.",
        f"Loss of mean Dice: {found['mean_dice_loss']:.4f}; Dice of int8 labels against float32 "
        f"labels: {found['dice_int8_against_float32']:.4f}. Dice: {dice}.",
    ]


def batch_section(found: dict[str, Any]) -> list[str]:
    """Return the results of scripts/bench_batch.py as lines of Markdown."""
    parts = [
        f"{batch['outside']:.0%} of {batch['seconds']:.0f} s in {batch['precision']}"
        for batch in found["batches"]
    ]
    cases = found["batches"][0]["cases"]
    return [
        "",
        "## Time outside the network",
        "",
        f"`python scripts/bench_batch.py`: the same volume as {cases} cases, own plan. The network "
        "did not compute in",
        f"{', and '.join(parts)}.",
    ]


def jobs_section(found: dict[str, Any]) -> list[str]:
    """Return the results of scripts/bench_jobs.py as lines of Markdown."""
    first, *_ = found["batches"]
    choices = list(first["medians"])
    lines = [
        "",
        "## Worker processes",
        "",
        "`python scripts/bench_jobs.py --batch FOLDER BUNDLE …`: seconds of the whole command, "
        "with its imports, by `--jobs`;",
        f"medians of {first['rounds']} runs each, in turns. The last column compares the default "
        f"to `--jobs {choices[0]}`.",
        "",
        table_row(["bundle", "cases", *choices, "times as fast"]),
        "|---" * (len(choices) + 3) + "|",
    ]
    for batch in found["batches"]:
        medians = list(batch["medians"].values())
        cells = [batch["bundle"], batch["cases"], *(f"{seconds:.1f}" for seconds in medians)]
        lines.append(table_row([*cells, f"{medians[0] / medians[-1]:.2f}"]))
    return lines


def table_row(cells: Iterable[object]) -> str:
    """Return one row of a Markdown table."""
    return "| " + " | ".join(map(str, cells)) + " |"


def tool_row(tool: str, found: dict[str, Any]) -> str:
    """Return the row of one tool in the page's first table; a cell is empty if not measured."""
    result, base = found["tools"][tool], found["tools"].get("monai")
    network = result["steps"].get("network")
    agreement = found["agreement_with_monai"].get(tool, {})
    # Other windows than MONAI's: labels of random weights differ there for that reason alone.
    if "own plan" in tool or tool == "nnunet":
        agreement = {}
    return table_row(
        [
            tool,
            f"{result['seconds']:.1f}",
            f"{base['seconds'] / result['seconds']:.2f}" if base else "",
            f"{result['peak_mb']:.0f}",
            f"{network:.1f}" if network else "",
            f"{1 - network / result['seconds']:.0%}" if network else "",
            f"{agreement['voxels']:.5f}" if agreement else "",
            f"{agreement['dice']:.4f}" if agreement else "",
        ]
    )


def render_page(found: dict[str, Any], args: argparse.Namespace) -> str:
    """Return the results as a Markdown page."""
    volume, machine, spec = found["volume"], found["machine"], found["spec"]
    shape = " × ".join(map(str, volume["shape"]))
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    lines = [
        "# Performance",
        "",
        "Generated by `scripts/bench --report docs/performance.md`. The figures are medians over "
        "rounds in which the tools took",
        "turns. Each time is from file to file, in a new process with the network already loaded.",
        "",
        f"{volume['name']} ({shape} voxels), {found['windows']} windows of "
        f"{found['network_gflop']:.0f} GFLOP, {spec['classes']} classes, {spec['bundle']}.",
        f"{machine['processor']}, {machine['threads']} threads; float32 matrix products reach "
        f"{found['sgemm_gflops']:.0f} GFLOP/s. {versions}.",
        "",
        "| tool | seconds | times as fast as MONAI | peak memory, MB | network, s | outside it | "
        "voxels as MONAI | Dice |",
        "|---|---|---|---|---|---|---|---|",
        *(tool_row(tool, found) for tool in found["tools"]),
        "",
        "`float32` and `int8` compute the same windows as MONAI. `own plan` places windows only "
        "over the foreground, as nnU-Net",
        "crops a volume to its nonzero part. With random weights the network finds labels in the "
        "background too, so the labels of",
        "these rows are not compared.",
    ]
    if args.plot and args.report:
        plot = os.path.relpath(args.plot, args.report.parent)
        lines += ["", f"![Seconds per volume, by step]({plot})"]
    sections = (
        (args.batch, batch_section),
        (args.jobs, jobs_section),
        (args.memory, memory_section),
        (args.int8, int8_section),
    )
    for path, section in sections:
        if path:
            lines += section(json.loads(path.read_text()))
    return "\n".join(lines) + "\n"


def draw_steps(found: dict[str, Any], path: Path) -> None:
    """Draw one bar of seconds per tool, in which each step has its colour."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 0.6 * len(found["tools"]) + 1.2), layout="constrained")
    colours: dict[str, str] = {}
    for row, result in enumerate(found["tools"].values()):
        left = 0.0
        for step, seconds in result["steps"].items():
            # The legend gets one entry per step, not one per bar.
            label = step if step not in colours else None
            colour = colours.setdefault(step, f"C{len(colours)}")
            axes.barh(row, seconds, left=left, color=colour, label=label)
            left += seconds
    axes.set_yticks(range(len(found["tools"])), list(found["tools"]))
    axes.invert_yaxis()
    axes.set_xlabel("seconds per volume")
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def log(line: str) -> None:
    """Print one line of progress."""
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    """Measure, or read earlier results, and write the files that the options name."""
    args = parse_arguments()
    found = json.loads(args.from_json.read_text()) if args.from_json else measure(args)
    if args.json:
        write_json(args.json, found)
    if args.plot:
        draw_steps(found, args.plot)
    text = render_page(found, args)
    if args.report:
        write_atomically(args.report, text.encode())
    print(text)


if __name__ == "__main__":
    main()
