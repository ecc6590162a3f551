"""How weights start and change: initialisation, optimizers, the time limit and the schedule."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import pytest
import torch
from ignite.engine import Engine, Events
from torch import nn

from pipeline.config.run import Augment, Run
from pipeline.errors import ConfigError
from pipeline.networks import UNet
from pipeline.training.optimisation import (
    Budget,
    build_optimizer,
    build_schedule,
    initialise,
)

RUN = Run(bundle="b", dataset="d", epochs=10, batch_size=2, learning_rate=0.1)


@pytest.mark.parametrize("dims", [2, 3])
def test_he_initialisation_keeps_the_variance(dims: int) -> None:
    torch.manual_seed(0)
    net = UNet(dims, 1, 2, (32, 64), (2,))
    before = [p.clone() for p in net.parameters()]
    initialise(net, RUN)
    assert all(torch.equal(old, new) for old, new in zip(before, net.parameters(), strict=True)), (
        "default: as PyTorch does"
    )
    initialise(net, replace(RUN, initialisation="he"))
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.ConvTranspose3d):
            stride = 1 if isinstance(module, nn.Conv2d | nn.Conv3d) else prod(module.stride)
            incoming = module.in_channels * prod(module.kernel_size) / stride
            assert float(module.weight.detach().std()) == pytest.approx(
                (2 / incoming) ** 0.5, rel=0.15
            )
            assert module.bias is not None
            assert not module.bias.any()


def test_the_optimizers() -> None:
    net = UNet(2, 1, 2, (2, 4))
    sgd = build_optimizer(net, replace(RUN, optimizer="sgd"))
    assert isinstance(sgd, torch.optim.SGD)
    assert sgd.defaults["momentum"] == 0.99
    assert isinstance(build_optimizer(net, RUN), torch.optim.AdamW)


@pytest.mark.parametrize(("minutes", "steps"), [(None, 40), (100.0, 40), (3.5, 14), (0.1, 1)])
def test_training_ends_with_its_time_and_the_rate_with_it(
    minutes: float | None, steps: int
) -> None:
    """Each step of this trainer takes 15 seconds of a fake clock; 10 epochs have 4 steps each."""
    clock = [1000.0]
    budget = Budget(minutes, now=lambda: clock[0])
    optimiser = build_optimizer(UNet(2, 1, 2, (2, 4)), RUN)
    rates = build_schedule(optimiser, RUN, 4, budget)
    seen = []

    def step(engine: Engine, batch: int) -> None:
        clock[0] += 15
        optimiser.step()
        rates.step()
        seen.append(rates.get_last_lr()[0])

    trainer = Engine(step)
    budget.attach(trainer)
    completed = []
    trainer.add_event_handler(Events.COMPLETED, lambda: completed.append(trainer.state.iteration))
    trainer.run(range(4), max_epochs=RUN.epochs)
    assert len(seen) == steps
    assert completed == [steps], "what is done at the end is done when the clock ends it too"
    assert max(seen) > 0.8 * RUN.learning_rate or steps == 1
    assert seen[-1] == pytest.approx(0, abs=1e-9)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"run\.minutes: expected more than 0"):
        replace(RUN, minutes=0.0)
    with pytest.raises(ConfigError, match=r"run\.border_sigma_mm"):
        replace(RUN, border_sigma_mm=0.0)
    with pytest.raises(ConfigError, match=r"elastic_grid: expected 2 points"):
        replace(RUN, augment=Augment(elastic_grid=1))
