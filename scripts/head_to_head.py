"""Trains a run and nnU-Net on the same fold, one after the other, each for the same time, and scores both by the same code.

    scripts/head_to_head configs/hippocampus_mr_3d.yaml --minutes 30 -o runs/head_to_head

The time is that of training; what nnU-Net needs to plan and preprocess, and both need to predict, is not counted. nnU-Net comes
from PyPI into `OUT/nnunet_venv`, with the torch that this project pins. What is done already is not done again.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.batch import output_path, segment_cases
from pipeline.bundle import open_bundle
from pipeline.cli import epoch_line
from pipeline.config import Run, load_spec
from pipeline.evaluation import compare_scores, score_case, summarise_scores
from pipeline.io import fold_cases, read_splits, write_csv, write_json
from pipeline.training import read_run, train_bundle
from pipeline.types import Case

NNUNET = "nnunetv2==2.8.1"
DATASET, NUMBER = "Dataset001_Fold", "1"
PINS = Path(__file__).parent.parent / "constraints.txt"


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path, help="a run with splits")
    parser.add_argument(
        "changes", nargs="*", metavar="KEY=VALUE", help="of its settings, as for `volseg train`"
    )
    parser.add_argument("--minutes", type=float, default=30.0, help="of training, each")
    parser.add_argument("-o", "--output", type=Path, required=True)
    return parser.parse_args()


def ours(run: Run, content: dict[str, Any], out: Path) -> list[dict[str, Any]]:
    """Trains the run in a bundle of its own, for its minutes, and scores the fold."""
    root = out / "volseg"
    if (
        not (root / "models" / "model.pt").is_file()
        or (root / "models" / "checkpoint.pt").is_file()
    ):
        (root / "configs").mkdir(parents=True, exist_ok=True)
        for name in ("spec.yaml", "card.yaml"):
            shutil.copyfile(Path(run.bundle) / "configs" / name, root / "configs" / name)
        mine = replace(run, bundle=str(root))
        train_bundle(
            mine,
            content | {"bundle": mine.bundle},
            lambda row: print(epoch_line(row, run.epochs)),
            restart=True,
        )
    cases = fold_cases(run.dataset, run.splits, run.fold, "val")
    segment_cases(open_bundle(root, device="cpu"), cases, out / "volseg_predictions")
    files = {case["case"]: output_path(out / "volseg_predictions", case["case"]) for case in cases}
    return scored(cases, files, load_spec(root / "configs" / "spec.yaml").labels)


def theirs(run: Run, minutes: float, out: Path) -> list[dict[str, Any]]:
    """Has nnU-Net plan, train for the minutes and predict the fold; scores what it predicted."""
    labels = load_spec(Path(run.bundle) / "configs" / "spec.yaml").labels
    train, cases = (
        fold_cases(run.dataset, run.splits, run.fold, part) for part in ("train", "val")
    )
    raw, preprocessed, results = (
        out / "nnunet" / name for name in ("raw", "preprocessed", "results")
    )
    found = (
        results
        / DATASET
        / "ClockedTrainer__nnUNetPlans__3d_fullres"
        / f"fold_{run.fold}"
        / "validation"
    )
    if not (found / "summary.json").is_file():
        as_raw([*train, *cases], raw / DATASET, labels)
        places = {"nnUNet_raw": raw, "nnUNet_preprocessed": preprocessed, "nnUNet_results": results}
        environment = os.environ | {name: str(place.resolve()) for name, place in places.items()}
        python = environment_of(out / "nnunet_venv")
        plan = [
            str(python.parent / "nnUNetv2_plan_and_preprocess"),
            "-d",
            NUMBER,
            "-c",
            "3d_fullres",
            "-np",
            "2",
        ]
        subprocess.run(plan, env=environment, check=True)
        write_json(
            preprocessed / DATASET / "splits_final.json", read_splits(run.dataset, str(run.splits))
        )
        script = Path(__file__).with_name("nnunet.py")
        subprocess.run(
            [python, script, NUMBER, str(run.fold), str(minutes)], env=environment, check=True
        )
    return scored(cases, {case["case"]: found / f"{case['case']}.nii.gz" for case in cases}, labels)


def environment_of(folder: Path) -> Path:
    """The Python of an environment that holds nnU-Net; made where it is not there."""
    python = folder / "bin" / "python"
    if not (folder / "bin" / "nnUNetv2_train").is_file():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        torch = next(
            line.split(";")[0].strip()
            for line in PINS.read_text().splitlines()
            if line.startswith("torch==")
        )
        subprocess.run([python, "-m", "pip", "install", "--quiet", NNUNET, torch], check=True)
    return python


def as_raw(cases: list[Case], folder: Path, labels: Any) -> None:
    """The cases as nnU-Net wants to find them: links, and a dataset.json."""
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for case in cases:
        channels = case["image"] if isinstance(case["image"], list | tuple) else [case["image"]]
        links = {f"imagesTr/{case['case']}_{i:04d}.nii.gz": path for i, path in enumerate(channels)}
        for name, path in {**links, f"labelsTr/{case['case']}.nii.gz": case["label"]}.items():
            (folder / name).unlink(missing_ok=True)
            (folder / name).symlink_to(Path(path).resolve())
    names = {str(i): f"channel {i}" for i in range(len(channels))}
    content = {
        "channel_names": names,
        "labels": dict(labels),
        "numTraining": len(cases),
        "file_ending": ".nii.gz",
    }
    write_json(folder / "dataset.json", content)


def scored(cases: list[Case], files: Mapping[str, Path], labels: Any) -> list[dict[str, Any]]:
    """One row a case and label; scores.csv, which `volseg compare` takes, beside the predictions."""
    rows = [row for case in cases for row in score_case(case, files[case["case"]], labels)]
    write_csv(next(iter(files.values())).parent / "scores.csv", rows)
    return rows


def main() -> None:
    """Trains, scores and compares."""
    args = arguments()
    changes = [*args.changes, f"minutes={args.minutes}", "epochs=100000"]
    run, content = read_run(args.config, changes)
    found = {
        "volseg": ours(run, content, args.output),
        "nnU-Net": theirs(run, args.minutes, args.output),
    }
    summaries = {name: summarise_scores(rows) for name, rows in found.items()}
    for name, summary in summaries.items():
        print(
            f"{name}: "
            + ", ".join(
                f"{row['label']} Dice {row['dice']:.4f}, HD95 {row['hd95_mm']:.2f} mm"
                for row in summary
            )
        )
    tests = compare_scores(found["volseg"], found["nnU-Net"], "dice")
    for row in tests:
        print(
            f"{row['label']}: {row['ours']:.4f} against {row['theirs']:.4f} over {row['cases']} cases, p = {row['p_value']:.3g}"
        )
    write_json(
        args.output / "summary.json",
        {"minutes": args.minutes, "summaries": summaries, "tests": tests},
    )


if __name__ == "__main__":
    main()
