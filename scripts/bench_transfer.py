"""Compare fine-tuning of a bundle with training from scratch, for the same minutes and few cases.

    python scripts/bench_transfer.py configs/hippocampus_mr_3d.yaml -o runs/transfer --minutes 10

Both train the network of the source bundle for the labels of the run, on the same cases, from the
same seed, and are scored on the run's held-out cases. The result is a table (transfer.md) and all
numbers (transfer.json): mean Dice of both, and the mean difference with its bootstrap interval over
cases. A result that is already in the folder is not trained again.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from pipeline.bundle import find_bundle, open_bundle
from pipeline.config import BundlePaths, Card, Run, read_yaml
from pipeline.evaluation import (
    ScoreRow,
    compare_scores,
    read_scores,
    segment_and_score,
    write_scores,
)
from pipeline.io import fold_cases, write_atomically, write_json
from pipeline.training import read_run, train

SCRATCH, TRANSFER = "scratch", "transfer"


def parse_arguments() -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path, help="YAML file of a run on the target data set.")
    parser.add_argument("changes", nargs="*", metavar="KEY=VALUE", help="Settings to change.")
    parser.add_argument("--source", default="brain_mr_structures", help="Bundle to start from.")
    parser.add_argument(
        "--cases", type=int, nargs="+", default=[5, 10, 20], help="Numbers of them."
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="Of each training.")
    parser.add_argument("--freeze", type=int, default=0, help="Epochs with a frozen encoder.")
    parser.add_argument("--encoder-rate", type=float, default=0.3, help="See `encoder_rate`.")
    parser.add_argument("--roi-size", type=int, nargs="+", help="Of the target, voxels.")
    parser.add_argument("--seed", type=int, default=0, help="Of the choice of cases and the runs.")
    parser.add_argument("-o", "--output", type=Path, required=True, help="Folder of the results.")
    return parser.parse_args()


def main() -> None:
    """Train, score and compare; write and print the table."""
    arguments = parse_arguments()
    run, content = read_run(arguments.config, arguments.changes)
    results = []
    for count in arguments.cases:
        scores = {}
        for start in (SCRATCH, TRANSFER):
            folder = arguments.output / f"{count}_{start}"
            scores[start] = trained_scores(folder, run, content, arguments, count, start)
        comparisons = compare_scores(scores[TRANSFER], scores[SCRATCH])
        results.append({"cases": count, "labels": [asdict(one) for one in comparisons]})
    arguments.output.mkdir(parents=True, exist_ok=True)
    settings = {key: value for key, value in vars(arguments).items() if key != "output"}
    write_json(
        arguments.output / "transfer.json",
        {"settings": {key: str(value) for key, value in settings.items()}, "results": results},
    )
    text = table(results)
    write_atomically(arguments.output / "transfer.md", text.encode())
    print(text)


def trained_scores(
    folder: Path,
    run: Run,
    content: dict[str, Any],
    arguments: argparse.Namespace,
    count: int,
    start: str,
) -> list[ScoreRow]:
    """Return the scores on the held-out cases after training on some cases.

    Args:
        folder: gets the bundle, its predictions and scores.csv.
        run: the run on the target data set.
        content: content of its YAML file.
        arguments: of the command line.
        count: number of training cases.
        start: `scratch` or `transfer`.
    """
    if (folder / "scores.csv").is_file():
        return read_scores(folder / "scores.csv")
    bundle = make_target(folder / "bundle", run, arguments)
    held_out = fold_cases(run.dataset, run.splits, run.fold, "val")
    chosen = chosen_cases(run, count, arguments.seed)
    names = [case["case"] for case in held_out]
    write_json(folder / "splits.json", [{"train": chosen, "val": names}])
    settings = content | {
        "bundle": str(bundle),
        "splits": str((folder / "splits.json").resolve()),
        "fold": 0,
        "minutes": arguments.minutes,
        "epochs": 100_000,  # the time ends the run
        "validate_every": 0,
        "repeats": max(1, 2 * run.cases_per_step // count),
        "seed": arguments.seed,
    }
    if start == TRANSFER:
        settings |= {
            "start": str(find_bundle(arguments.source)),
            "freeze_encoder": arguments.freeze,
            "encoder_rate": arguments.encoder_rate,
        }
    config = folder / "run.yaml"
    write_atomically(config, yaml.safe_dump(settings, sort_keys=False).encode())
    train(config, restart=True)
    model = open_bundle(bundle)
    rows = list(segment_and_score(model, held_out, folder / "predictions").scores)
    write_scores(folder / "scores.csv", rows)
    return rows


def make_target(bundle: Path, run: Run, arguments: argparse.Namespace) -> Path:
    """Write spec and card of a bundle with the run's labels and the source's network."""
    source = read_yaml(BundlePaths(find_bundle(arguments.source)).spec, "spec")
    spec = read_yaml(BundlePaths(run.bundle).spec, "spec")
    spec["network"] = source["network"] | {"ensemble": 1}
    if arguments.roi_size:
        spec["roi_size"] = arguments.roi_size
    card = Card(
        name=bundle.parent.name,
        description="A comparison of starts.",
        task="a comparison",
        authors="scripts/bench_transfer.py",
        copyright="see the data",
        intended_use="a comparison",
        data_source="the data set of the run",
        data_type="volumes",
        references=(),
        eval_metrics={},
        changelog={"0.0.1": "first"},
    )
    for path, value in ((BundlePaths(bundle).spec, spec), (BundlePaths(bundle).card, asdict(card))):
        path.parent.mkdir(parents=True, exist_ok=True)
        plain = {key: list(v) if isinstance(v, tuple) else v for key, v in value.items()}
        write_atomically(path, yaml.safe_dump(plain, sort_keys=False).encode())
    return bundle


def chosen_cases(run: Run, count: int, seed: int) -> list[str]:
    """Return the names of random training cases of the run's fold; more cases add to fewer."""
    training = fold_cases(run.dataset, run.splits, run.fold, "train")
    names = sorted(case["case"] for case in training)
    order = np.random.default_rng(seed).permutation(len(names))
    return [names[i] for i in order[:count]]


def table(results: list[dict[str, Any]]) -> str:
    """Return the comparisons as a table in Markdown."""
    lines = [
        "| cases | label | from scratch | fine-tuned | difference, 95 % interval | p |",
        "|---|---|---|---|---|---|",
    ]
    for result in results:
        for row in result["labels"]:
            lines.append(
                f"| {result['cases']} | {row['label']} | {row['theirs']:.4f} | {row['ours']:.4f} | "
                f"{row['difference']:+.4f} [{row['low']:+.4f}, {row['high']:+.4f}] | "
                f"{row['p_value']:.2g} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
