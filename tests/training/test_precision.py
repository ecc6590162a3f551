"""The precision of training on processors with and without bfloat16."""

from __future__ import annotations

import logging
import platform
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

from pipeline.config.run import Run, TrainingPrecision
from pipeline.inference.device import ISA_LIMITS, has_amx
from pipeline.networks import UNet
from pipeline.training import precision as precision_module
from pipeline.training.precision import (
    BFLOAT16_CHECKS,
    TrainingInferer,
    bfloat16_is_faster,
    emulates_bfloat16,
    has_bfloat16,
)

RUN = Run(bundle="b", dataset="d", epochs=10, batch_size=2, learning_rate=0.1)
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("precision", "dtype"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)]
)
@pytest.mark.parametrize("deep", [0, 1])
def test_a_run_names_the_precision_of_the_convolutions(
    precision: TrainingPrecision,
    dtype: torch.dtype,
    deep: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Logits and gradients are in float32 in both precisions, and close to each other."""
    monkeypatch.setattr(precision_module, "emulates_bfloat16", lambda device: False)
    net = UNet(3, 1, 3, (4, 8, 8), norm="instance", deep_supervision=deep)
    dtypes = []
    net.output.register_forward_hook(lambda *call: dtypes.append(call[2].dtype))
    x = torch.randn(1, 1, 8, 12, 16)
    found = TrainingInferer(replace(RUN, precision=precision))(x, net)
    logits, levels = (found[0], found) if deep else (found, [found])
    assert dtypes == [dtype]
    assert {level.dtype for level in levels} == {torch.float32}
    assert [level.shape[2:] for level in levels] == [(8, 12, 16), (4, 6, 8)][: deep + 1]
    logits.square().mean().backward()
    assert net.output.weight.grad is not None
    assert net.output.weight.grad.dtype == torch.float32
    torch.testing.assert_close(logits, net.eval()(x), atol=0.05, rtol=0.05)


def test_emulated_bfloat16_trains_in_float32_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(precision_module, "emulates_bfloat16", lambda device: True)
    net = UNet(3, 1, 3, (4, 8), norm="instance")
    x = torch.randn(1, 1, 8, 12, 16)
    inferer = TrainingInferer(replace(RUN, precision="bfloat16"))
    with caplog.at_level(logging.WARNING, logger="volseg"):
        first, second = inferer(x, net), inferer(x, net)
    assert len(caplog.records) == 1
    assert "run.precision" in caplog.text
    assert torch.equal(first, net(x))
    assert torch.equal(first, second)


def test_float32_gives_no_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(precision_module, "emulates_bfloat16", lambda device: True)
    TrainingInferer(RUN)(torch.randn(1, 1, 8, 8), UNet(2, 1, 3, (4, 8), norm="instance"))
    assert not caplog.records


@pytest.mark.parametrize(
    ("machine", "avx512", "amx", "emulated"),
    [
        ("x86_64", False, False, True),
        ("x86_64", True, False, False),
        ("x86_64", False, True, False),
        ("AMD64", False, False, True),
        ("aarch64", False, False, False),
    ],
)
def test_x86_without_bfloat16_instructions_emulates(
    machine: str, avx512: bool, amx: bool, emulated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    for name, value in zip(BFLOAT16_CHECKS, (avx512, amx), strict=True):
        monkeypatch.setattr(torch.cpu, name, lambda value=value: value, raising=False)
    assert emulates_bfloat16(CPU) is emulated
    assert not emulates_bfloat16(torch.device("cuda"))


@pytest.mark.parametrize(
    ("limit", "emulated"),
    [("AVX2", True), ("avx512_core", True), ("AVX512_CORE_AMX", False), ("DEFAULT", False)],
)
@pytest.mark.parametrize("variable", ISA_LIMITS)
def test_a_limit_of_the_instructions_counts(
    variable: str, limit: str, emulated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """oneDNN may be kept from the instructions that the processor has."""
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    for name in BFLOAT16_CHECKS:
        monkeypatch.setattr(torch.cpu, name, lambda: True, raising=False)
    for name in ISA_LIMITS:
        monkeypatch.delenv(name, raising=False)
    assert not emulates_bfloat16(CPU)
    assert has_amx()
    monkeypatch.setenv(variable, limit)
    assert emulates_bfloat16(CPU) is emulated
    assert has_bfloat16(CPU) is not emulated
    assert has_amx() is not emulated


@pytest.mark.parametrize(
    ("has", "faster", "expected"),
    [
        (True, True, torch.bfloat16),
        (True, False, torch.float32),
        (False, True, torch.float32),
    ],
)
def test_auto_is_the_faster_precision_where_the_processor_has_bfloat16(
    has: bool,
    faster: bool,
    expected: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Both are tried once, with the first batch."""
    tried: list[torch.Tensor] = []

    def try_both(network: object, inputs: torch.Tensor) -> bool:
        tried.append(inputs)
        return faster

    monkeypatch.setattr(precision_module, "has_bfloat16", lambda device: has)
    monkeypatch.setattr(precision_module, "emulates_bfloat16", lambda device: not has)
    monkeypatch.setattr(precision_module, "bfloat16_is_faster", try_both)
    net = UNet(3, 1, 3, (4, 8), norm="instance")
    dtypes = []
    net.output.register_forward_hook(lambda *call: dtypes.append(call[2].dtype))
    inferer = TrainingInferer(replace(RUN, precision="auto"))
    batches = torch.randn(2, 1, 1, 8, 12, 16)
    for batch in batches:
        inferer(batch, net)
    assert dtypes == [expected] * 2
    assert len(tried) == has
    assert not caplog.records


class _Costly(nn.Module):
    """A layer with a state, a random part and a cost of its own in each precision."""

    clock: Callable[[], list[float]]  # functions, because copies share what they return
    seconds: Callable[[], dict[bool, list[float]]]

    def __init__(self, clock: list[float], seconds: dict[bool, list[float]]) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv3d(1, 3, 3), nn.BatchNorm3d(3), nn.Dropout())
        self.clock, self.seconds = lambda: clock, lambda: seconds

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        features = self.layers[0](x)
        clock, seconds = self.clock(), self.seconds()[features.dtype == torch.bfloat16]
        clock.append(clock[-1] + seconds.pop(0))
        logits: torch.Tensor = self.layers[1:](features)
        return [logits, logits[..., ::2]]


@pytest.mark.parametrize(
    ("float32", "bfloat16", "faster"),
    [
        ([9.0, 1.0, 1.0], [9.0, 0.5, 0.8], True),
        ([9.0, 1.0, 1.0], [9.0, 0.95, 0.95], False),  # not clearly
        ([2.0, 1.0, 1.0], [2.0, 1.5, 1.6], False),
    ],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_trying_both_precisions_changes_nothing(
    float32: list[float],
    bfloat16: list[float],
    faster: bool,
    wrapped: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Weights, statistics, gradients and random numbers of the run stay."""
    clock = [0.0]
    monkeypatch.setattr("pipeline.training.precision.time.perf_counter", lambda: clock[-1])
    net = _Costly(clock, {False: [*float32], True: [*bfloat16]})
    before = {name: value.clone() for name, value in net.state_dict().items()}
    batch = torch.randn(2, 1, 8, 9, 10)
    torch.manual_seed(3)
    with torch.no_grad():
        found = bfloat16_is_faster(nn.DataParallel(net) if wrapped else net, batch)
    drawn = torch.rand(4)
    assert found is faster
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert all(weight.grad is None for weight in net.parameters())
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(4))


def test_unknown_processors_have_no_fast_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert not has_bfloat16(CPU)
    assert not has_bfloat16(torch.device("mps"))


def test_a_torch_without_these_checks_is_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    for name in BFLOAT16_CHECKS:
        monkeypatch.delattr(torch.cpu, name, raising=False)
    assert not emulates_bfloat16(CPU)
