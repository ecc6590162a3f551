"""Measures volseg beside MONAI's stock path and nnU-Net's predictor: one network, one volume, tools taking turns.

Each round runs every tool once, file to file, in a fresh process; ratios are of medians. Without --bundle the network has
random weights (times do not depend on them; agreement of labels means more with a trained bundle).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import nibabel as nib
import numpy as np
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

from pipeline.bundle import export_bundle, find_bundle, refresh_bundle
from pipeline.config import load_spec
from pipeline.inference import window_grid
from pipeline.io import write_atomically, write_json
from pipeline.networks import build_network, save_weights

HERE = Path(__file__).parent
CARD = (
    "name: Benchmark\ndescription: Random weights for timing.\ntask: none\nauthors: scripts/bench\ncopyright: none\n"
    "intended_use: timing\ndata_source: none\ndata_type: none\nreferences: []\neval_metrics: {}\nchangelog: {0.0.0: made}\n"
)


def arguments() -> argparse.Namespace:
    """What the command line says."""
    data = Path(os.environ.get("VOLSEG_DATA", "."))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--volume", type=Path, default=data / "real" / "head1mm_T1w.nii.gz", help="a NIfTI file"
    )
    parser.add_argument("--bundle", help="a trained bundle instead of random weights")
    parser.add_argument("--classes", type=int, default=18)
    parser.add_argument("--features", type=int, nargs="+", default=[16, 32, 64, 128, 160])
    parser.add_argument("--roi", type=int, nargs=3, default=[96, 96, 96], help="voxels")
    parser.add_argument("--overlap", type=float, default=0.25)
    parser.add_argument(
        "--tools",
        nargs="+",
        default=["monai", "float32", "int8", "float32 own plan", "int8 own plan"],
    )
    parser.add_argument(
        "--nnunet-python",
        help="the Python of an environment with nnunetv2 and volseg; adds the tool nnunet",
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="writes the results there")
    parser.add_argument("--plot", type=Path, help="draws them there")
    parser.add_argument("--report", type=Path, help="writes them there as a page")
    parser.add_argument(
        "--from-json", type=Path, help="measures nothing: page and plot of earlier results"
    )
    parser.add_argument(
        "--memory", type=Path, help="results of scripts/bench_memory.py, for the page"
    )
    parser.add_argument(
        "--batch", type=Path, help="results of scripts/bench_batch.py, for the page"
    )
    parser.add_argument("--int8", type=Path, help="results of scripts/bench_int8.py, for the page")
    return parser.parse_args()


def make_bundle(folder: Path, args: argparse.Namespace) -> Path:
    """A bundle with random weights of the shape that the arguments ask for."""
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
    (configs / "card.yaml").write_text(CARD)
    torch.manual_seed(0)
    save_weights(build_network(load_spec(configs / "spec.yaml")), folder / "models" / "model.pt")
    refresh_bundle(folder)
    return folder


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that is measured, as it goes into the JSON file."""
    tools = [*args.tools, *(["nnunet"] if args.nnunet_python else [])]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        root = find_bundle(args.bundle) if args.bundle else make_bundle(folder / "bundle", args)
        if (
            any("int8" in tool for tool in tools)
            and not (root / "models" / "model_int8.xml").is_file()
        ):
            say("calibrating int8 on the volume")
            export_bundle(root, "openvino", precision="int8", calibrate=[args.volume])
        runs: dict[str, list[dict[str, Any]]] = {tool: [] for tool in tools}
        sgemm = []
        for number in range(args.rounds):
            sgemm.append(sgemm_gflops())
            for tool in tools:
                python = args.nnunet_python if tool == "nnunet" else sys.executable
                runs[tool].append(
                    once(
                        python, tool, root, args.volume, folder / f"{tool.replace(' ', '_')}.nii.gz"
                    )
                )
                say(
                    f"round {number + 1} of {args.rounds}: {tool}: {runs[tool][-1]['seconds']:.1f} s"
                )
        results = {tool: summary(listed) for tool, listed in runs.items()}
        agreement = {
            tool: agree(folder, tool) for tool in tools if tool != "monai" and "monai" in tools
        }
        return assembled(args, root, results, agreement, median(sgemm))


def once(python: str, tool: str, root: Path, volume: Path, out: Path) -> dict[str, Any]:
    """One run of one tool in a process of its own."""
    scratch = str(out.parent / "nnunet")
    environment = (
        os.environ
        | {"PYTHONPATH": str(HERE.parent)}
        | dict.fromkeys(("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"), scratch)
    )
    command = [python, str(HERE / "bench_tools.py"), tool, str(root), str(volume), str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{tool} failed:\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of one tool's rounds, and every round's seconds."""
    steps = {step: median(run["steps"][step] for run in runs) for step in runs[0]["steps"]}
    return {
        "seconds": median(run["seconds"] for run in runs),
        "rounds": [run["seconds"] for run in runs],
        "peak_mb": median(run["peak_mb"] for run in runs),
        "steps": steps,
    }


def agree(folder: Path, tool: str) -> dict[str, float]:
    """The fraction of voxels with MONAI's label, and the mean Dice against MONAI's labels over those that it has."""
    theirs, ours = (
        np.asarray(nib.load(folder / f"{name.replace(' ', '_')}.nii.gz").dataobj)
        for name in ("monai", tool)
    )
    both = np.bincount(
        theirs[ours == theirs].astype(int).ravel(), minlength=int(max(theirs.max(), ours.max())) + 1
    )
    sizes = np.stack(
        [np.bincount(a.astype(int).ravel(), minlength=len(both)) for a in (ours, theirs)]
    ).sum(axis=0)
    dice = 2 * both[1:] / np.maximum(sizes[1:], 1)
    return {
        "voxels": float((ours == theirs).mean()),
        "dice": float(dice[np.unique(theirs[theirs > 0]).astype(int) - 1].mean()),
    }


def assembled(
    args: argparse.Namespace,
    root: Path,
    results: dict[str, Any],
    agreement: dict[str, Any],
    sgemm: float,
) -> dict[str, Any]:
    """The content of the JSON file."""
    spec = load_spec(root / "configs" / "spec.yaml")
    shape = [
        max(n, r) for n, r in zip(nib.load(args.volume).shape[:3], spec.roi_size, strict=False)
    ]
    windows = int(
        np.prod([len(starts) for starts in window_grid(shape, spec.roi_size, spec.overlap).starts])
    )
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        build_network(spec).eval()(torch.zeros(1, len(spec.channels), *spec.roi_size))
    work = counter.get_total_flops() * windows / 1e9
    for tool, found in results.items():
        if "network" in found["steps"] and "own plan" not in tool:  # which looks at fewer windows
            found["gflops"] = work / found["steps"]["network"]

    def speedup(base: str) -> dict[str, float]:
        ours = {tool: found for tool, found in results.items() if tool not in ("monai", "nnunet")}
        return (
            {tool: results[base]["seconds"] / found["seconds"] for tool, found in ours.items()}
            if base in results
            else {}
        )

    return {
        "speedup_vs_monai": speedup("monai"),
        "speedup_vs_nnunet": speedup("nnunet"),
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
            "processor": processor(),
            "threads": torch.get_num_threads(),
            "system": platform.platform(terse=True),
        },
        "versions": {name: version(name) for name in ("volseg", "monai", "torch", "openvino")},
    }


def sgemm_gflops() -> float:
    """What this machine reaches in a product of two float32 matrices, GFLOP/s."""
    a, n = torch.randn(2048, 2048), 5
    a @ a
    started = time.perf_counter()
    for _ in range(n):
        a @ a
    return 2 * 2048**3 * n / (time.perf_counter() - started) / 1e9


def processor() -> str:
    """The processor's name, and its instructions that matter here."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    flags = next((line for line in lines if line.startswith("flags")), "")
    known = [
        flag
        for flag in ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "avx512_bf16")
        if f" {flag}" in flags
    ]
    return f"{name} ({', '.join(known)})"


def memory_lines(found: dict[str, Any]) -> list[str]:
    """What scripts/bench_memory.py measured, as Markdown."""
    shape = " × ".join(map(str, found["shape"]))
    lines = [
        "",
        "## Memory",
        "",
        f"`python scripts/bench_memory.py`: a volume of {shape} voxels, `volseg segment` in a process of its own.",
        "",
        "| classes | --max-memory | estimate, GB | peak, GB | labels |",
        "|---|---|---|---|---|",
    ]
    for run in found["runs"]:
        peak = f"{run['peak_gb']:.2f}" if run["status"] == "done" else "refused before it starts"
        cells = [
            str(run["classes"]),
            run["limit"],
            f"{run['estimate_gb']:.2f}",
            peak,
            run["labels"],
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "Labels are told by the first digits of their file's SHA-256."]
    if "slope" in found:
        slope = found["slope"]
        lines.append(
            f"Over cases in one process resident memory grows by {slope['mb_a_case']:.2f} MB a case."
        )
    return lines


def int8_lines(found: dict[str, Any]) -> list[str]:
    """What scripts/bench_int8.py measured, as Markdown."""
    dice = ", ".join(f"{name} {value:.4f}" for name, value in found["dice"].items())
    return [
        "",
        "## What int8 costs",
        "",
        f"`python scripts/bench_int8.py hippocampus_mr_3d …`: {found['cases']} validation cases, quantised on training cases.",
        f"Mean Dice lost: {found['mean_dice_loss']:.4f}; Dice of int8 labels against float32 labels: "
        f"{found['dice_int8_against_float32']:.4f}. Dice: {dice}.",
    ]


def batch_lines(found: dict[str, Any]) -> list[str]:
    """What scripts/bench_batch.py measured, as Markdown."""
    parts = [
        f"{one['outside']:.0%} of {one['seconds']:.0f} s in {one['precision']}"
        for one in found["batches"]
    ]
    cases = found["batches"][0]["cases"]
    return [
        "",
        "## Beside the network",
        "",
        f"`python scripts/bench_batch.py`: the same volume as {cases} cases, own plan. The network did not compute in",
        f"{', and '.join(parts)}.",
    ]


def page(found: dict[str, Any], args: argparse.Namespace) -> str:
    """The results as Markdown."""
    base = found["tools"].get("monai")
    lines = [
        "# Performance",
        "",
        "Generated by `scripts/bench --report docs/performance.md`; figures are medians over rounds in which the tools took",
        "turns, file to file, each in a fresh process with the network loaded.",
        "",
        f"{found['volume']['name']} ({' × '.join(map(str, found['volume']['shape']))} voxels), {found['windows']} windows of "
        f"{found['network_gflop']:.0f} GFLOP, {found['spec']['classes']} classes, {found['spec']['bundle']}.",
        f"{found['machine']['processor']}, {found['machine']['threads']} threads; float32 matrix products reach "
        f"{found['sgemm_gflops']:.0f} GFLOP/s. "
        + ", ".join(f"{name} {v}" for name, v in found["versions"].items())
        + ".",
        "",
        "| tool | seconds | times as fast as MONAI | peak memory, MB | network, s | outside it | voxels as MONAI | Dice |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for tool, one in found["tools"].items():
        network = one["steps"].get("network")
        alike = (
            {}
            if "own plan" in tool or tool == "nnunet"
            else found["agreement_with_monai"].get(tool, {})
        )
        cells = [
            tool,
            f"{one['seconds']:.1f}",
            f"{base['seconds'] / one['seconds']:.2f}" if base else "",
            f"{one['peak_mb']:.0f}",
            f"{network:.1f}" if network else "",
            f"{1 - network / one['seconds']:.0%}" if network else "",
            f"{alike['voxels']:.5f}" if alike else "",
            f"{alike['dice']:.4f}" if alike else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "`float32` and `int8` take MONAI's windows, all of them. `own plan` spreads windows over the box of what is no air, as",
        "nnU-Net crops a volume to what is not zero; random weights say something in air too: labels are not compared there.",
    ]
    if args.plot and args.report:
        lines += [
            "",
            f"![Seconds a volume, step by step]({os.path.relpath(args.plot, args.report.parent)})",
        ]
    for path, section in (
        (args.batch, batch_lines),
        (args.memory, memory_lines),
        (args.int8, int8_lines),
    ):
        if path:
            lines += section(json.loads(path.read_text()))
    return "\n".join(lines) + "\n"


def plot(found: dict[str, Any], path: Path) -> None:
    """Bars of seconds, each step in its colour."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 0.6 * len(found["tools"]) + 1.2), layout="constrained")
    colours: dict[str, str] = {}
    for row, one in enumerate(found["tools"].values()):
        left = 0.0
        for step, seconds in one["steps"].items():
            new = step not in colours
            colour = colours.setdefault(step, f"C{len(colours)}")
            axes.barh(row, seconds, left=left, color=colour, label=step if new else None)
            left += seconds
    axes.set_yticks(range(len(found["tools"])), list(found["tools"]))
    axes.invert_yaxis()
    axes.set_xlabel("seconds a volume")
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def say(line: str) -> None:
    """One line of progress."""
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    """Measures, and writes what was asked for."""
    args = arguments()
    found = json.loads(args.from_json.read_text()) if args.from_json else measure(args)
    if args.json:
        write_json(args.json, found)
    if args.plot:
        plot(found, args.plot)
    if args.report:
        write_atomically(args.report, page(found, args).encode())
    print(page(found, args))


if __name__ == "__main__":
    main()
