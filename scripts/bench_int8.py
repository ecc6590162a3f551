"""Measure how much accuracy a bundle loses in int8.

    python scripts/bench_int8.py hippocampus_mr_3d DATASET --splits splits_5fold.json

A copy of the bundle is quantised on the training cases of a fold; float32 and int8 are scored on
its validation cases.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any

import click
import numpy as np

from pipeline.bundle import export_bundle, find_bundle, open_bundle
from pipeline.cli import show_log
from pipeline.evaluation import dice
from pipeline.inference import predict_case
from pipeline.io import fold_cases, read, write_json
from pipeline.types import Array, Case

PRECISIONS = ("float32", "int8")


def score_precisions(bundle: Path, cases: list[Case]) -> dict[str, Any]:
    """Return the mean Dice of each precision against the labels, and of int8 against float32."""
    models = {name: open_bundle(bundle, device="cpu", precision=name) for name in PRECISIONS}
    values = {name: value for name, value in models["int8"].spec.labels.items() if value}
    scores: dict[str, list[float]] = defaultdict(list)
    between: list[float] = []
    for case in cases:
        found: dict[str, Array] = {
            name: predict_case(model, case["image"]).labels for name, model in models.items()
        }
        reference = np.rint(read(case["label"]).array)
        for name, value in values.items():
            for precision, labels in found.items():
                score = dice(labels == value, reference == value)
                scores[f"{precision} {name}"].append(score)
            between.append(dice(found["int8"] == value, found["float32"] == value))
    # Dice is nan where neither map has the label: such a case has no score.
    means = {key: fmean(v for v in listed if v == v) for key, listed in scores.items()}
    loss = fmean(means[f"float32 {name}"] - means[f"int8 {name}"] for name in values)
    return {
        "cases": len(cases),
        "dice": means,
        "mean_dice_loss": loss,
        "dice_int8_against_float32": fmean(between),
    }


@click.command()
@click.argument("bundle")
@click.argument("dataset")
@click.option("--splits", required=True, help="File with the folds, as of nnU-Net.")
@click.option("--fold", default=0, show_default=True, help="Fold to score, from 0.")
@click.option(
    "--json", "output", type=click.Path(path_type=Path), help="Write the results to this file."
)
def main(bundle: str, dataset: str, splits: str, fold: int, output: Path | None) -> None:
    """Quantise BUNDLE on the training cases of DATASET and score it on the validation cases."""
    show_log()
    with tempfile.TemporaryDirectory() as name:
        copy = Path(shutil.copytree(find_bundle(bundle), Path(name) / "bundle"))
        training = [str(case["image"]) for case in fold_cases(dataset, splits, fold, "train")]
        report = export_bundle(copy, "openvino", precision="int8", calibrate=training)
        found = score_precisions(copy, fold_cases(dataset, splits, fold, "val")) | {
            "export": report
        }
    click.echo(json.dumps(found, indent=2))
    if output:
        write_json(output, found)


if __name__ == "__main__":
    main()
