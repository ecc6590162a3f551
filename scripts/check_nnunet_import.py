"""Compare the labels of imported models of nnU-Net with those of nnU-Net itself.

    .venv/bin/python scripts/check_nnunet_import.py DATASET -o OUT [--minutes 3]

DATASET is a folder of labelled volumes that `volseg train` takes. nnU-Net is installed from PyPI
into `OUT/nnunet_venv`; small networks (2D, 3D, and 3D with a residual encoder; two folds of the 3D
one) are planned and trained by it for the given minutes each. Then `volseg import` makes bundles of
them, and `volseg segment` and `nnUNetv2_predict_from_modelfolder --disable_tta` segment the same
cases. Printed are, per model: Dice of nnU-Net with the truth and Dice between the two, per label,
the lowest over the cases; the fraction of equal voxels; and the wall time of both commands per
case. Further variants have other spacings in plans.json, so that volumes are resampled.

A second call continues where the first one stopped. The exit status is 1 below `--dice`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from head_to_head import nnunet_python, write_raw_dataset

from pipeline.io import find_pairs, read
from pipeline.types import Array, Case

DATASET, NUMBER = "Dataset001_Check", "1"
PLAIN, RESIDUAL = "nnUNetPlans", "nnUNetResEncUNetMPlans"
FEATURES, WIDEST = 8, 64  # of the small networks: a few minutes of training on two cores are enough


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One comparison.

    Attributes:
        name: for readers, and of its folder.
        plans: name of nnU-Net's plans.
        configuration: of these plans.
        folds: folds that are averaged.
        spacing: spacing in place of the planned one, mm, in nnU-Net's order of axes.
    """

    name: str
    plans: str = PLAIN
    configuration: str = "3d_fullres"
    folds: tuple[str, ...] = ("0",)
    spacing: tuple[float, ...] = ()


VARIANTS = (
    Variant(name="3d"),
    Variant(name="2d", configuration="2d"),
    Variant(name="3d_residual_encoder", plans=RESIDUAL),
    Variant(name="3d_two_folds", folds=("0", "1")),
    Variant(name="3d_resampled", spacing=(0.8, 1.3, 1.1)),
    Variant(name="3d_thick_slices", spacing=(3.5, 0.9, 1.1)),
    Variant(name="2d_resampled", configuration="2d", spacing=(1.2, 0.9)),
)


def parse_arguments() -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dataset", type=Path, help="Folder of labelled volumes.")
    parser.add_argument("-o", "--output", type=Path, required=True, help="Folder for all files.")
    parser.add_argument("--minutes", type=float, default=3.0, help="Minutes of each training.")
    parser.add_argument("--train", type=int, default=60, help="Number of cases to train with.")
    parser.add_argument("--cases", type=int, default=5, help="Number of cases to segment.")
    parser.add_argument("--only", nargs="*", default=[], help="Names of variants to run.")
    parser.add_argument("--precision", default="float32", help="Of volseg; nnU-Net has float32.")
    parser.add_argument("--dice", type=float, default=0.995, help="Smallest Dice per label.")
    return parser.parse_args()


def environment(out: Path) -> dict[str, str]:
    """Return the environment variables for nnU-Net's commands, whose folders are in OUT."""
    folders = {f"nnUNet_{name}": str(out / name) for name in ("raw", "preprocessed", "results")}
    return os.environ | folders | {"nnUNet_n_proc_DA": "1", "nnUNet_compile": "f"}


def plan(train: list[Case], out: Path, tools: Path) -> None:
    """Have nnU-Net plan and preprocess the training cases, and make its networks small."""
    labels = json.loads((out / "labels.json").read_text())
    write_raw_dataset(train, out / "raw" / DATASET, labels)
    variables = environment(out)
    options = ["-d", NUMBER, "-c", "2d", "3d_fullres", "-np", "2", "2"]
    subprocess.run([tools / "nnUNetv2_plan_and_preprocess", *options], env=variables, check=True)
    residual = ["-d", NUMBER, "-pl", "nnUNetPlannerResEncM"]
    subprocess.run([tools / "nnUNetv2_plan_experiment", *residual], env=variables, check=True)
    for name in (PLAIN, RESIDUAL):
        path = out / "preprocessed" / DATASET / f"{name}.json"
        plans = json.loads(path.read_text())
        for configuration, batch in (("2d", 16), ("3d_fullres", 2)):
            settings = plans["configurations"][configuration]
            settings["batch_size"] = batch
            shrink(settings["architecture"]["arch_kwargs"])
        path.write_text(json.dumps(plans))


def shrink(arguments: dict[str, Any]) -> None:
    """Make a network small, in place."""
    levels = arguments["n_stages"]
    arguments["features_per_stage"] = [min(WIDEST, FEATURES * 2**i) for i in range(levels)]
    if "n_blocks_per_stage" in arguments:
        arguments["n_blocks_per_stage"] = [1, *[2] * (levels - 1)]


def train_model(variant: Variant, minutes: float, out: Path, python: Path) -> Path:
    """Have nnU-Net train the folds of a variant that are not trained yet; return its folder."""
    folder = out / "results" / DATASET / f"nnUNetTrainer__{variant.plans}__{variant.configuration}"
    script = Path(__file__).with_name("nnunet.py")
    for fold in variant.folds:
        if not (folder / f"fold_{fold}" / "checkpoint_final.pth").is_file():
            options = ["--configuration", variant.configuration, "--plans", variant.plans]
            command = [python, script, NUMBER, fold, minutes, *options, "--plain"]
            subprocess.run([str(part) for part in command], env=environment(out), check=True)
    return folder


def with_spacing(model: Path, variant: Variant, out: Path) -> Path:
    """Return the folder of the model, or of a copy that has the variant's spacing."""
    if not variant.spacing:
        return model
    copy = out / "models" / variant.name
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(model, copy)
    plans = json.loads((copy / "plans.json").read_text())
    plans["configurations"][variant.configuration]["spacing"] = list(variant.spacing)
    (copy / "plans.json").write_text(json.dumps(plans))
    return copy


def timed(command: Sequence[Any], variables: dict[str, str]) -> float:
    """Run a command and return its wall time, seconds."""
    started = time.perf_counter()
    subprocess.run(command, env=variables, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def dice(first: Array, second: Array, value: int) -> float:
    """Return the Dice of one label of two label maps, 1 where neither has it."""
    in_first, in_second = first == value, second == value
    total = in_first.sum() + in_second.sum()
    return 1.0 if total == 0 else float(2 * (in_first & in_second).sum() / total)


def compare(
    variant: Variant, model: Path, test: list[Case], out: Path, tools: Path, precision: str
) -> float:
    """Segment the cases by both, print how far they agree, and return the lowest Dice."""
    work = out / "compared" / variant.name
    shutil.rmtree(work, ignore_errors=True)
    ours, theirs, bundle = work / "volseg", work / "nnunet", work / "bundle"
    scans = out / "scans"
    folds = list(variant.folds)
    volseg: list[Any] = [sys.executable, "-m", "pipeline.cli"]
    asked = [argument for fold in folds for argument in ("--fold", fold)]
    subprocess.run([*volseg, "import", model, "-o", bundle, *asked], check=True)
    predict: list[Any] = [
        tools / "nnUNetv2_predict_from_modelfolder",
        "-i",
        scans,
        "-o",
        theirs,
        "-m",
        model,
    ]
    options = ["-f", *folds, "--disable_tta", "-device", "cpu", "-npp", "1", "-nps", "1"]
    their_seconds = timed([*predict, *options], environment(out))
    # the first call also converts the network for OpenVINO, which is kept
    segment = [*volseg, "segment", scans, "-b", bundle, "--precision", precision]
    first_seconds = timed([*segment, "-o", work / "first"], dict(os.environ))
    our_seconds = timed([*segment, "-o", ours], dict(os.environ))
    lowest: dict[str, list[float]] = {}
    equal = []
    for case in test:
        predicted = np.asarray(read(theirs / f"{case['case']}.nii.gz").array)
        labels = np.asarray(read(next(ours.glob(f"{case['case']}*_seg.nii.gz"))).array)
        truth = np.asarray(read(case["label"]).array)
        equal.append(float((predicted == labels).mean()))
        for name, value in json.loads((out / "labels.json").read_text()).items():
            if value:
                both = lowest.setdefault(name, [1.0, 1.0])
                both[0] = min(both[0], dice(predicted, truth, value))
                both[1] = min(both[1], dice(predicted, labels, value))
    for name, (true_dice, agreement) in lowest.items():
        print(f"{variant.name:20} {name:12} truth {true_dice:.3f}  nnU-Net {agreement:.5f}")
    count = len(test)
    print(
        f"{variant.name:20} equal voxels {min(equal):.6f}; seconds per case: nnU-Net "
        f"{their_seconds / count:.2f}, volseg {our_seconds / count:.2f} (first call "
        f"{first_seconds / count:.2f})",
        flush=True,
    )
    return min(agreement for _, agreement in lowest.values())


def split_cases(dataset: Path, train: int, count: int, out: Path) -> tuple[list[Case], list[Case]]:
    """Return the cases to train with and those to segment; links have the names of nnU-Net."""
    layout = find_pairs([dataset])
    out.mkdir(parents=True, exist_ok=True)
    (out / "labels.json").write_text(json.dumps(layout.labels))
    cases = layout.cases[: train + count]
    scans = out / "scans"
    scans.mkdir(exist_ok=True)
    for case in cases[train:]:
        link = scans / f"{case['case']}_0000.nii.gz"
        link.unlink(missing_ok=True)
        link.symlink_to(Path(str(case["image"])).resolve())
    return cases[:train], cases[train:]


def main() -> None:
    """Train, import and compare all variants."""
    args = parse_arguments()
    out = args.output.resolve()
    train, test = split_cases(args.dataset, args.train, args.cases, out)
    python = nnunet_python(out / "nnunet_venv")
    if not (out / "preprocessed" / DATASET / f"{RESIDUAL}.json").is_file():
        plan(train, out, python.parent)
    lowest = 1.0
    for variant in VARIANTS:
        if not args.only or variant.name in args.only:
            trained = train_model(variant, args.minutes, out, python)
            model = with_spacing(trained, variant, out)
            found = compare(variant, model, test, out, python.parent, args.precision)
            lowest = min(lowest, found)
    print(f"lowest Dice between the two: {lowest:.5f}")
    sys.exit(0 if lowest >= args.dice else 1)


if __name__ == "__main__":
    main()
