"""Train volseg and nnU-Net on the same fold for the same time, and score both with the same code.

    scripts/head_to_head configs/hippocampus_mr_3d.yaml --minutes 30 -o runs/head_to_head

The minutes are those of each training: planning and preprocessing by nnU-Net and all predictions
are not counted. With several `--configurations` nnU-Net trains each of them for that time, and the
one with the best mean Dice on the validation cases counts, a choice in its favour. nnU-Net is
installed from PyPI into `OUT/nnunet_venv`, with the torch version that constraints.txt pins. A
second call continues where the first one stopped.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from pipeline.batch import output_path, segment_cases
from pipeline.bundle import open_bundle
from pipeline.cli import epoch_line
from pipeline.config import Run, load_spec
from pipeline.evaluation import (
    ScoreRow,
    compare_scores,
    score_case,
    summarise_scores,
    write_scores,
)
from pipeline.io import fold_cases, read_splits, write_json
from pipeline.training import read_run, train_bundle
from pipeline.types import Case, PathOrStr

NNUNET = "nnunetv2==2.8.1"
DATASET, NUMBER = "Dataset001_Fold", "1"
CONFIGURATIONS = ("2d", "3d_fullres")
CONSTRAINTS = Path(__file__).parent.parent / "constraints.txt"


def parse_arguments() -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path, help="YAML file of a run with splits.")
    parser.add_argument(
        "changes",
        nargs="*",
        metavar="KEY=VALUE",
        help="Settings of the run to change, as for `volseg train`.",
    )
    parser.add_argument(
        "--minutes", type=float, default=30.0, help="Minutes of training, for each of the two."
    )
    parser.add_argument(
        "-o", "--output", type=Path, required=True, help="Folder for models and scores."
    )
    parser.add_argument(
        "--configurations",
        nargs="+",
        choices=CONFIGURATIONS,
        default=["3d_fullres"],
        help="nnU-Net's configurations, each trained for the minutes.",
    )
    parser.add_argument(
        "--no-mirroring",
        action="store_true",
        help="Have nnU-Net predict each image once instead of averaging over eight mirror images: "
        "hours less for whole heads on a CPU.",
    )
    return parser.parse_args()


def score_volseg(run: Run, content: dict[str, Any], out: Path) -> list[ScoreRow]:
    """Train the run in a new bundle, predict the validation cases and return their scores."""
    root = out / "volseg"
    # A checkpoint is left only by a training that was interrupted.
    trained = (root / "models" / "model.pt").is_file()
    if not trained or (root / "models" / "checkpoint.pt").is_file():
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
    return score_files(cases, files, load_spec(root / "configs" / "spec.yaml").labels)


def score_nnunet(
    run: Run, minutes: float, configurations: Sequence[str], out: Path, *, mirroring: bool
) -> dict[str, list[ScoreRow]]:
    """Have nnU-Net plan, train and predict the validation cases; return the scores of each way."""
    labels = load_spec(Path(run.bundle) / "configs" / "spec.yaml").labels
    train = fold_cases(run.dataset, run.splits, run.fold, "train")
    cases = fold_cases(run.dataset, run.splits, run.fold, "val")
    raw, preprocessed = out / "nnunet" / "raw", out / "nnunet" / "preprocessed"
    results = out / "nnunet" / "results"
    environment = os.environ | {
        "nnUNet_raw": str(raw.resolve()),
        "nnUNet_preprocessed": str(preprocessed.resolve()),
        "nnUNet_results": str(results.resolve()),
    }
    scores = {}
    for configuration in configurations:
        trainer = f"ClockedTrainer__nnUNetPlans__{configuration}"
        found = results / DATASET / trainer / f"fold_{run.fold}" / "validation"
        if not (found / "summary.json").is_file():
            python = nnunet_python(out / "nnunet_venv")
            trained = (found.parent / "checkpoint_final.pth").is_file()
            if not trained:
                write_raw_dataset([*train, *cases], raw / DATASET, labels)
                plan = str(python.parent / "nnUNetv2_plan_and_preprocess")
                options = ["-d", NUMBER, "-c", configuration, "-np", "2"]
                subprocess.run([plan, *options], env=environment, check=True)
                write_json(
                    preprocessed / DATASET / "splits_final.json",
                    read_splits(run.dataset, str(run.splits)),
                )
            script = Path(__file__).with_name("nnunet.py")
            command = [str(python), str(script), NUMBER, str(run.fold), str(minutes)]
            command += ["--configuration", configuration]
            command += ["--no-mirroring"] * (not mirroring) + ["--only-predict"] * trained
            subprocess.run(command, env=environment, check=True)
        predictions = out / "nnunet_predictions" / configuration
        files = {case["case"]: predictions / f"{case['case']}.nii.gz" for case in cases}
        theirs = {new: old for old, new in numbers_for_nnunet(labels).items()}
        for path in files.values():
            renumber(found / path.name, theirs, path)
        scores[configuration] = score_files(cases, files, labels)
    return scores


def numbers_for_nnunet(labels: Mapping[str, int]) -> dict[int, int]:
    """Return label number → the one that nnU-Net gets: it wants consecutive numbers from 0."""
    return {number: i for i, number in enumerate(sorted(labels.values()))}


def renumber(path: PathOrStr, numbers: Mapping[int, int], out: Path) -> None:
    """Write a label map with other numbers for its labels."""
    image = nib.Nifti1Image.from_filename(path)
    voxels = np.asanyarray(image.dataobj)
    unknown = sorted(set(np.unique(voxels).tolist()) - set(numbers))
    if unknown:
        raise SystemExit(f"{path}: has voxels of {unknown}, which are no labels of the run")
    table = np.zeros(max(numbers) + 1, np.uint16)
    table[list(numbers)] = list(numbers.values())
    out.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(table[voxels.astype(np.intp)], image.affine), out)


def mean_dice(rows: Sequence[ScoreRow]) -> float:
    """Return the mean Dice over the labels."""
    return float(np.mean([row.metrics["dice"].mean for row in summarise_scores(rows)]))


def nnunet_python(folder: Path) -> Path:
    """Return the Python of the environment with nnU-Net, which is made if it does not exist."""
    python = folder / "bin" / "python"
    if not (folder / "bin" / "nnUNetv2_train").is_file():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        pins = CONSTRAINTS.read_text().splitlines()
        torch = next(line for line in pins if line.startswith("torch=="))
        subprocess.run([python, "-m", "pip", "install", "--quiet", NNUNET, torch], check=True)
    return python


def write_raw_dataset(cases: list[Case], folder: Path, labels: Mapping[str, int]) -> None:
    """Write the cases in nnU-Net's layout: links to the images, label maps with its numbers."""
    numbers = numbers_for_nnunet(labels)
    (folder / "imagesTr").mkdir(parents=True, exist_ok=True)
    for case in cases:
        channels = case["image"] if isinstance(case["image"], list | tuple) else [case["image"]]
        for i, path in enumerate(channels):
            link = folder / "imagesTr" / f"{case['case']}_{i:04d}.nii.gz"
            link.unlink(missing_ok=True)
            link.symlink_to(Path(path).resolve())
        renumber(case["label"], numbers, folder / "labelsTr" / f"{case['case']}.nii.gz")
    names = {str(i): f"channel {i}" for i in range(len(channels))}
    content = {
        "channel_names": names,
        "labels": {name: numbers[number] for name, number in labels.items()},
        "numTraining": len(cases),
        "file_ending": ".nii.gz",
    }
    write_json(folder / "dataset.json", content)


def score_files(cases: list[Case], files: Mapping[str, Path], labels: Any) -> list[ScoreRow]:
    """Return one row per case and label.

    The rows are also written as scores.csv, which `volseg compare` reads, next to the predictions.
    """
    rows = [row for case in cases for row in score_case(case, files[case["case"]], labels)]
    write_scores(next(iter(files.values())).parent / "scores.csv", rows)
    return rows


def main() -> None:
    """Train both, score both and compare the scores."""
    args = parse_arguments()
    changes = [*args.changes, f"minutes={args.minutes}", "epochs=100000"]
    run, content = read_run(args.config, changes)
    volseg = score_volseg(run, content, args.output)
    theirs = score_nnunet(
        run, args.minutes, args.configurations, args.output, mirroring=not args.no_mirroring
    )
    for configuration, rows in theirs.items():
        print(f"nnU-Net {configuration}: mean Dice {mean_dice(rows):.4f}")
    best = max(theirs, key=lambda name: mean_dice(theirs[name]))
    found = {"volseg": volseg, "nnU-Net": theirs[best]}
    summaries = {name: summarise_scores(rows) for name, rows in found.items()}
    for name, summary in summaries.items():
        labels = [
            f"{row.label} Dice {row.metrics['dice'].mean:.4f}, "
            f"HD95 {row.metrics['hd95_mm'].mean:.2f} mm"
            for row in summary
        ]
        print(f"{name}: {', '.join(labels)}")
    tests = compare_scores(found["volseg"], found["nnU-Net"], "dice")
    for row in tests:
        print(
            f"{row.label}: {row.ours:.4f} against {row.theirs:.4f} "
            f"over {row.cases} cases, p = {row.p_value:.3g}"
        )
    results = {
        "minutes": args.minutes,
        "nnunet_configuration": best,
        "summaries": {
            name: [row.columns() for row in summary] for name, summary in summaries.items()
        },
        "tests": [asdict(row) for row in tests],
    }
    write_json(args.output / "summary.json", results)


if __name__ == "__main__":
    main()
