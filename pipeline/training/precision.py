"""The precision of training: float32 or bfloat16, and the processors that lack bfloat16."""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

import torch
from monai.inferers import SimpleInferer

from pipeline.config import Run
from pipeline.log import LOGGER
from pipeline.training.distributed import is_first_process

X86 = ("x86_64", "AMD64")  # `platform.machine()` on Linux and macOS, and on Windows
# functions of torch.cpu that return whether the processor can multiply bfloat16; older releases of
# torch lack some of them
BFLOAT16_CHECKS = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")


def emulates_bfloat16(device: torch.device) -> bool:
    """Return whether a device has no bfloat16 instructions, so that torch has to emulate them.

    Convolutions then are about 30 times slower. Only x86 processors with neither AVX512-BF16 nor
    AMX are known to lack them; all other devices are assumed to have them.
    """
    if device.type != "cpu" or platform.machine() not in X86:
        return False
    checks = [getattr(torch.cpu, name, None) for name in BFLOAT16_CHECKS]
    known = [check for check in checks if check is not None]
    return bool(known) and not any(check() for check in known)


class TrainingInferer(SimpleInferer):
    """A MONAI inferer that applies the network to a training batch in the run's precision.

    bfloat16 means torch's autocast: weights and returned logits are float32. On a processor that
    would only emulate bfloat16, the network runs in float32 and a warning is logged once.

    Args:
        run: settings of the training run.

    Shapes:
        (B, C, *roi_size) → logits (B, classes, *output_size) float32, or lists of them for a
        network with deep supervision or an ensemble.
    """

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.bfloat16 = run.precision == "bfloat16"

    def __call__(
        self, inputs: torch.Tensor, network: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        if self.bfloat16 and emulates_bfloat16(inputs.device):
            self._fall_back()
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=self.bfloat16):
            logits = network(inputs, *args, **kwargs)
        return in_float32(logits)

    def _fall_back(self) -> None:
        self.bfloat16 = False
        if is_first_process():
            LOGGER.warning(
                "run.precision: this processor has neither AVX512-BF16 nor AMX and would only "
                "emulate bfloat16; training runs in float32"
            )


def in_float32(logits: Any) -> Any:
    """Return logits in float32: a tensor, or a list of tensors or of such lists."""
    if isinstance(logits, list):
        return [in_float32(part) for part in logits]
    return logits.float()
