"""How fast this machine trains: a few real steps, timed."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from statistics import median

import torch
from monai.data import list_data_collate
from monai.transforms.traits import RandomizableTrait

from pipeline.config import TRAINING_PRECISIONS, Run, Spec, TrainingPrecision
from pipeline.inference import build_inferer, keep_freed_memory, resolve_device
from pipeline.networks import build_loss, build_unet, channels_last
from pipeline.training import TrainingInferer, build_optimizer, prepare_batch
from pipeline.transforms import IMAGE, preprocessing, training_transform
from pipeline.types import Case

WARM, TIMED = 2, 4  # steps
STARTING = 8.0  # seconds that a run takes before its first case and after its last step


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingTimes:
    """Seconds that the parts of a run take.

    Attributes:
        steps: precision → of one training step, drawing its patches included.
        validation: of one pass over its cases.
        around: of what is done once, before and after.
    """

    steps: dict[TrainingPrecision, float]
    validation: float
    around: float

    @property
    def precision(self) -> TrainingPrecision:
        """The one whose steps are fastest."""
        return min(self.steps, key=lambda name: self.steps[name])

    @property
    def step(self) -> float:
        """Of one step in that precision."""
        return self.steps[self.precision]


def time_training(
    spec: Spec, run: Run, cases: Sequence[Case], training: int, validation: int
) -> TrainingTimes:
    """How fast a run goes here, in each precision that it may have.

    Args:
        spec: of the network.
        run: its batch, augmentation and loss.
        cases: a few of those to come.
        training, validation: how many cases there will be of each.
    """
    keep_freed_memory()
    device = resolve_device("auto")
    transform = training_transform(preprocessing(spec), spec, run, device)
    first = transform.get_index_of_first(lambda step: isinstance(step, RandomizableTrait)) or len(
        transform.transforms
    )
    started = time.perf_counter()
    read = [transform(case, end=first) for case in cases]
    each = (time.perf_counter() - started) / len(cases)

    def batches() -> Iterator[dict[str, torch.Tensor]]:
        for number in count():
            some = [
                read[i % len(read)]
                for i in range(number * run.cases_per_step, (number + 1) * run.cases_per_step)
            ]
            drawn = [transform(case, start=first) for case in some]
            yield list_data_collate(
                [patch for one in drawn for patch in (one if isinstance(one, list) else [one])]
            )

    steps = {
        name: _step_seconds(spec, replace(run, precision=name), batches(), device)
        for name in TRAINING_PRECISIONS
    }
    image = preprocessing(spec)({IMAGE: cases[0]["image"]})[IMAGE]
    network = build_unet(spec).eval().to(device)
    started = time.perf_counter()
    with torch.inference_mode():
        build_inferer(spec)(image[None].to(device), network)
    once = each + time.perf_counter() - started
    return TrainingTimes(
        steps=steps, validation=validation * once, around=STARTING + training * each
    )


def _step_seconds(
    spec: Spec, run: Run, batches: Iterator[dict[str, torch.Tensor]], device: torch.device
) -> float:
    """Seconds of one training step, the median of a few."""
    network = channels_last(build_unet(spec).to(device)).train()
    change, criterion, forward, found = (
        build_optimizer(network, run),
        build_loss(spec, run),
        TrainingInferer(run),
        [],
    )
    for _ in range(WARM + TIMED):
        started = time.perf_counter()
        image, label = prepare_batch(next(batches), device)
        change.zero_grad()
        value = criterion(forward(image, network), label)
        value.backward()
        change.step()
        float(value.detach())  # waits for a GPU
        found.append(time.perf_counter() - started)
    return median(found[WARM:])
