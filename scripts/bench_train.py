"""Times training steps beside MONAI's stock loop: the same network, batch, transforms and cases, one process after the other.

    python scripts/bench_train.py configs/hippocampus_mr_3d.yaml --json runs/train.json

The stock loop is `SupervisedTrainer` as MONAI's tutorials have it: contiguous float32 tensors, `CacheDataset`, MONAI's default
`DataLoader`, `DiceCELoss`, AdamW. Ours is the run's own wiring. Each takes its turn in every round; what counts is the median
time of a step, patches drawn and weights changed. Of an ensemble, one network is timed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.data import CacheDataset, DataLoader
from monai.engines import SupervisedTrainer
from monai.losses import DeepSupervisionLoss, DiceCELoss

from pipeline.bundle import refresh_bundle
from pipeline.config import load_spec, read_yaml
from pipeline.io import training_cases, write_json
from pipeline.networks import build_unet
from pipeline.training import read_run, training_parser
from pipeline.transforms import IMAGE, LABEL, preprocessing, training_transform

WARM = 3  # steps


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path, help="a run")
    parser.add_argument(
        "changes", nargs="*", metavar="KEY=VALUE", help="of its settings, as for `volseg train`"
    )
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--loop",
        choices=["ours", "monai"],
        help="time this one here, and print the seconds of a step",
    )
    parser.add_argument("--json", type=Path, help="writes the results there")
    return parser.parse_args()


def step_seconds(trainer: Engine, steps: int) -> float:
    """The median time from the end of a step to that of the next."""
    ends: list[float] = []

    def mark(engine: Engine) -> None:
        float(engine.state.output[0]["loss"])  # waits for a GPU
        ends.append(time.perf_counter())
        if len(ends) > WARM + steps:
            engine.terminate()

    trainer.add_event_handler(Events.ITERATION_COMPLETED, mark)
    trainer.run()
    return median(b - a for a, b in zip(ends[WARM:], ends[WARM + 1 :], strict=False))


def ours(args: argparse.Namespace) -> float:
    """The run's own trainer, in a bundle of its own, without what it writes."""
    run, content = read_run(args.config, args.changes)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        shutil.copytree(Path(run.bundle) / "configs", root / "configs")
        facts = read_yaml(root / "configs" / "spec.yaml", "spec")
        facts["network"]["ensemble"] = 1
        write_json(root / "configs" / "spec.yaml", facts)  # JSON is YAML
        content |= {
            "bundle": folder,
            "epochs": 1000,
            "minutes": None,
            "validate_every": 0,
            "keep": "last",
            "patience": None,
        }
        write_json(root / "configs" / "run.yaml", content)
        refresh_bundle(root)
        parser = training_parser(root)
        parser.get_parsed_content("initialize")
        trainer: Engine = parser.get_parsed_content("train::trainer")
        return step_seconds(trainer, args.steps)


def stock(args: argparse.Namespace) -> float:
    """MONAI's trainer as its tutorials have it."""
    run, _ = read_run(args.config, args.changes)
    model = load_spec(Path(run.bundle) / "configs" / "spec.yaml")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cases: list[Any] = training_cases(run.dataset, replace(run, repeats=1))
    dataset = CacheDataset(
        cases, training_transform(preprocessing(model), model, run), progress=False
    )
    network = build_unet(model).to(device)
    loss: torch.nn.Module = DiceCELoss(softmax=True, to_onehot_y=True, batch=True)
    trainer = SupervisedTrainer(
        device=device,
        max_epochs=1000,
        train_data_loader=DataLoader(
            dataset, batch_size=run.cases_per_step, shuffle=True, drop_last=True
        ),
        network=network,
        optimizer=torch.optim.AdamW(network.parameters(), lr=run.learning_rate),
        loss_function=DeepSupervisionLoss(loss) if model.network.deep_supervision else loss,
        prepare_batch=lambda batch, device, non_blocking, **_: (
            batch[IMAGE].to(device),
            batch[LABEL].to(device),
        ),
    )
    return step_seconds(trainer, args.steps)


def main() -> None:
    """Times one loop, or has both timed in turns."""
    args = arguments()
    if args.loop:
        print(json.dumps(ours(args) if args.loop == "ours" else stock(args)))
        return
    found: dict[str, list[float]] = {"ours": [], "monai": []}
    for _ in range(args.rounds):
        for loop, seconds in found.items():
            command = [
                sys.executable,
                __file__,
                str(args.config),
                *args.changes,
                "--steps",
                str(args.steps),
                "--loop",
                loop,
            ]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            seconds.append(float(done.stdout.splitlines()[-1]))
            print(f"{loop}: {seconds[-1]:.3f} s a step", file=sys.stderr)
    ratio = median(found["monai"]) / median(found["ours"])
    print(
        f"ours {median(found['ours']):.3f} s, MONAI's stock loop {median(found['monai']):.3f} s: {ratio:.2f} times as fast"
    )
    if args.json:
        write_json(args.json, {"seconds": found, "ratio": ratio})


if __name__ == "__main__":
    main()
