"""Compare the time of a training step to MONAI's tutorial loop.

    python scripts/bench_train.py configs/hippocampus_mr_3d.yaml --json runs/train.json

Both loops use the same network, batch, transforms and cases. MONAI's loop is `SupervisedTrainer` as
in its tutorials: contiguous float32 tensors, `CacheDataset`, MONAI's default `DataLoader`,
`DiceCELoss`, AdamW. Ours is the wiring of the run. In every round each loop runs once, in a new
process; the result is the median time of a step, from drawing the patches to updating the weights.
Of an ensemble, one network is timed.
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
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.data import CacheDataset, DataLoader
from monai.engines import SupervisedTrainer
from monai.losses import DeepSupervisionLoss, DiceCELoss

from pipeline.bundle import read_wiring, refresh_bundle
from pipeline.config import load_spec, read_yaml
from pipeline.io import training_cases, write_json
from pipeline.networks import build_unet
from pipeline.training import read_run
from pipeline.transforms import IMAGE, LABEL, preprocessing, training_transform

WARM_UP = 3  # steps that are not timed: the first ones fill caches and choose kernels


def parse_arguments() -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path, help="YAML file of a run.")
    parser.add_argument(
        "changes",
        nargs="*",
        metavar="KEY=VALUE",
        help="Settings of the run to change, as for `volseg train`.",
    )
    parser.add_argument("--steps", type=int, default=25, help="Steps to time per round.")
    parser.add_argument("--rounds", type=int, default=2, help="Runs of each loop.")
    parser.add_argument(
        "--loop",
        choices=["ours", "monai"],
        help="Time this loop in this process and print the seconds per step.",
    )
    parser.add_argument("--json", type=Path, help="Write the results to this file.")
    return parser.parse_args()


def step_seconds(trainer: Engine, steps: int) -> float:
    """Return the median time from the end of a step to the end of the next, s."""
    ends: list[float] = []

    def mark(engine: Engine) -> None:
        # Reading the loss waits until a GPU has finished the step.
        float(engine.state.output[0]["loss"])
        ends.append(time.perf_counter())
        if len(ends) > WARM_UP + steps:
            engine.terminate()

    trainer.add_event_handler(Events.ITERATION_COMPLETED, mark)
    trainer.run()
    return median(end - start for start, end in pairwise(ends[WARM_UP:]))


def time_ours(args: argparse.Namespace) -> float:
    """Return the seconds per step of the run's own trainer, without validation or files."""
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
        parser = read_wiring(root)
        parser.get_parsed_content("initialize")
        trainer: Engine = parser.get_parsed_content("train::trainer")
        return step_seconds(trainer, args.steps)


def time_monai(args: argparse.Namespace) -> float:
    """Return the seconds per step of MONAI's trainer as in its tutorials."""
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
    """Time one loop in this process, or both in turns in processes of their own."""
    args = parse_arguments()
    if args.loop:
        print(json.dumps(time_ours(args) if args.loop == "ours" else time_monai(args)))
        return
    found: dict[str, list[float]] = {"ours": [], "monai": []}
    for _ in range(args.rounds):
        for loop, seconds in found.items():
            options = ["--steps", str(args.steps), "--loop", loop]
            command = [sys.executable, __file__, str(args.config), *args.changes, *options]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            seconds.append(float(done.stdout.splitlines()[-1]))
            print(f"{loop}: {seconds[-1]:.3f} s per step", file=sys.stderr)
    ours, monai = median(found["ours"]), median(found["monai"])
    ratio = monai / ours
    print(f"ours {ours:.3f} s, MONAI's loop {monai:.3f} s: {ratio:.2f} times as fast")
    if args.json:
        write_json(args.json, {"seconds": found, "ratio": ratio})


if __name__ == "__main__":
    main()
