"""The precision of training: float32 or bfloat16, and the processors that lack bfloat16."""

from __future__ import annotations

import copy
import platform
import time
from collections.abc import Callable
from typing import Any

import torch
from monai.inferers import SimpleInferer

from pipeline.config import Run
from pipeline.inference import isa_limit
from pipeline.log import LOGGER
from pipeline.training.distributed import from_first_process, is_first_process

X86 = ("x86_64", "AMD64")  # `platform.machine()` on Linux and macOS, and on Windows
AMPERE = (8, 0)  # compute capability of the first GPUs with bfloat16
# words in a limit of the user on oneDNN's instructions that still allow bfloat16
BFLOAT16_ISAS = ("BF16", "FP16", "AMX", "DEFAULT", "ALL")
# functions of torch.cpu that return whether the processor can multiply bfloat16; older releases of
# torch lack some of them
BFLOAT16_CHECKS = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
TRIALS = 3  # passes of a batch that are timed in each precision; the fastest one counts
CLEARLY_FASTER = 0.9  # bfloat16 must need less than this share of float32's time


def emulates_bfloat16(device: torch.device) -> bool:
    """Return whether a device has no bfloat16 instructions, so that torch has to emulate them.

    Convolutions then are about 30 times slower. Only x86 processors with neither AVX512-BF16 nor
    AMX are known to lack them, or those whose user has limited oneDNN to older instructions
    (`isa_limit`); all other devices are assumed to have them.
    """
    if device.type != "cpu" or platform.machine() not in X86:
        return False
    limit = isa_limit()
    if limit and not any(word in limit for word in BFLOAT16_ISAS):
        return True
    checks = [getattr(torch.cpu, name, None) for name in BFLOAT16_CHECKS]
    known = [check for check in checks if check is not None]
    return bool(known) and not any(check() for check in known)


def has_bfloat16(device: torch.device) -> bool:
    """Return whether a device is known to have instructions for bfloat16.

    That is stricter than the opposite of `emulates_bfloat16`: devices that torch tells nothing
    about are taken to have none.
    """
    if device.type == "cuda":
        # AMD's GPUs since the MI100, and Nvidia's since Ampere, where it is not emulated
        return torch.cuda.get_device_capability(device) >= AMPERE
    if device.type != "cpu" or platform.machine() not in X86:
        return False
    known = any(hasattr(torch.cpu, name) for name in BFLOAT16_CHECKS)
    return known and not emulates_bfloat16(device)


def bfloat16_is_faster(network: Callable[..., Any], inputs: torch.Tensor) -> bool:
    """Return whether a training step takes clearly less time in bfloat16 than in float32.

    A copy of the network passes the batch forward and backward a few times in each precision, so
    that neither weights nor random numbers of the run change. On a CPU only: a GPU would still
    compute when the clock is read.

    Args:
        network: the network that is trained.
        inputs: (B, C, *roi_size), a training batch.
    """
    for wrapper in ("module", "_orig_mod"):  # DistributedDataParallel, torch.compile
        network = getattr(network, wrapper, network)
    probe = copy.deepcopy(network)
    with torch.random.fork_rng([]), torch.enable_grad():
        float32 = _fastest_pass(probe, inputs, bfloat16=False)
        bfloat16 = _fastest_pass(probe, inputs, bfloat16=True)
    LOGGER.info("a training step takes %.2f s in float32, %.2f s in bfloat16", float32, bfloat16)
    return bfloat16 < CLEARLY_FASTER * float32


def _fastest_pass(network: Callable[..., Any], inputs: torch.Tensor, *, bfloat16: bool) -> float:
    """Return the shortest time of a forward and backward pass, seconds."""
    seconds = []
    for _ in range(TRIALS):
        started = time.perf_counter()
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=bfloat16):
            logits = network(inputs)
        total = _sum(in_float32(logits))
        if total.requires_grad:
            torch.autograd.backward(total)
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def _sum(logits: Any) -> torch.Tensor:
    if isinstance(logits, list):
        return torch.stack([_sum(part) for part in logits]).sum()
    total: torch.Tensor = logits.sum()
    return total


class TrainingInferer(SimpleInferer):
    """A MONAI inferer that applies the network to a training batch in the run's precision.

    bfloat16 means torch's autocast: weights and returned logits are float32. On a processor that
    would only emulate bfloat16, the network runs in float32 and a warning is logged once.

    The precision `auto` is chosen at the first batch: float32 where not `has_bfloat16`; bfloat16 on
    a GPU that has it; on a processor that has it, the faster of both (`bfloat16_is_faster`). A
    checkpoint keeps the choice, so that a resumed run ends with the same weights.

    Args:
        run: settings of the training run.

    Shapes:
        (B, C, *roi_size) → logits (B, classes, *output_size) float32, or lists of them for a
        network with deep supervision or an ensemble.
    """

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.bfloat16 = run.precision == "bfloat16"
        self.undecided = run.precision == "auto"

    def __call__(
        self, inputs: torch.Tensor, network: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        if self.undecided:
            self.bfloat16, self.undecided = self._choose(inputs, network), False
        if self.bfloat16 and emulates_bfloat16(inputs.device):
            self._fall_back()
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=self.bfloat16):
            logits = network(inputs, *args, **kwargs)
        return in_float32(logits)

    def state_dict(self) -> dict[str, bool]:
        """Return the choice of the precision `auto`, for a checkpoint."""
        return {"bfloat16": self.bfloat16, "undecided": self.undecided}

    def load_state_dict(self, state: dict[str, bool]) -> None:
        """Take over the choice of a checkpoint."""
        self.bfloat16, self.undecided = state["bfloat16"], state["undecided"]

    def _choose(self, inputs: torch.Tensor, network: Callable[..., Any]) -> bool:
        if not has_bfloat16(inputs.device):
            return False
        if inputs.device.type != "cpu":
            return True
        return bool(from_first_process(bfloat16_is_faster(network, inputs)))

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
