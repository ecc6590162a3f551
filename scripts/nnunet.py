"""Train nnU-Net for a given time instead of 1,000 epochs, and predict the fold's validation cases.

    python scripts/nnunet.py DATASET_ID FOLD MINUTES [--configuration 3d_fullres]

scripts/head_to_head.py and scripts/check_nnunet_import.py run this with the Python of the
environment with nnU-Net; the environment variables `nnUNet_raw`, `nnUNet_preprocessed` and
`nnUNet_results` name its folders.

Network, augmentation, loss, optimizer and prediction (averaged over eight mirror images) are
nnU-Net's. Two things differ: the polynomial decay of the learning rate follows the clock, so that
it ends with the training, and there is no validation during training.
"""

from __future__ import annotations

import argparse
import json
import os
import time

import torch
from nnunetv2.run import run_training
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

POWER = 0.9  # exponent of nnU-Net's polynomial decay


class ClockedTrainer(nnUNetTrainer):  # type: ignore[misc, unused-ignore]
    """nnU-Net's trainer with a limit on the time instead of the epochs."""

    minutes = 30.0
    predicts = True
    mirroring = True  # of predictions

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Predict the validation cases."""
        if not self.predicts:
            return
        if not self.mirroring:
            self.inference_allowed_mirroring_axes = None
        super().perform_actual_validation(save_probabilities)

    def run_training(self) -> None:
        """Train until the time is used up."""
        self.on_train_start()
        self.network.train()
        started, steps, used = time.monotonic(), 0, 0.0
        while used < 1:
            for group in self.optimizer.param_groups:
                group["lr"] = self.initial_lr * (1 - used) ** POWER
            loss = self.train_step(next(self.dataloader_train))["loss"]
            steps += 1
            used = (time.monotonic() - started) / (60 * self.minutes)
            if steps % 20 == 0:
                print(
                    f"step {steps}: loss {loss:.4f}, {60 * self.minutes * used:.0f} s", flush=True
                )
        self.current_epoch = 1
        self.on_train_end()
        print(json.dumps({"steps": steps, "seconds": time.monotonic() - started}), flush=True)


def main() -> None:
    """Train and predict."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dataset", help="Number of the dataset.")
    parser.add_argument("fold", type=int, help="Fold to leave out, from 0.")
    parser.add_argument("minutes", type=float, help="Minutes of training.")
    parser.add_argument("--configuration", default="3d_fullres", help="Configuration of the plans.")
    parser.add_argument("--plans", default="nnUNetPlans", help="Name of the plans.")
    parser.add_argument(
        "--plain",
        action="store_true",
        help="Save the model under the name of nnU-Net's own trainer, so that nnUNetv2_predict "
        "opens it, and predict no validation cases.",
    )
    parser.add_argument(
        "--no-mirroring",
        action="store_true",
        help="Predict each image once instead of averaging over eight mirror images.",
    )
    parser.add_argument(
        "--continue", dest="go_on", action="store_true", help="Start from the fold's last weights."
    )
    parser.add_argument(
        "--only-predict",
        action="store_true",
        help="Predict with the weights of a training that has ended.",
    )
    args = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    ClockedTrainer.minutes = args.minutes
    ClockedTrainer.mirroring = not args.no_mirroring
    if args.plain:
        ClockedTrainer.__name__ = nnUNetTrainer.__name__
        ClockedTrainer.predicts = False
    run_training.recursive_find_trainer_class_by_name = lambda name: ClockedTrainer
    run_training.run_training(
        args.dataset,
        args.configuration,
        args.fold,
        plans_identifier=args.plans,
        continue_training=args.go_on,
        only_run_validation=args.only_predict,
        device=torch.device("cpu"),
    )


if __name__ == "__main__":
    main()
