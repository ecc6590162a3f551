"""One training run in several processes, as `torchrun` starts them: one per GPU.

Each process trains on its share of the cases. The first process writes all files and takes all
decisions; the others follow it. In a single process these functions change nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import ignite.distributed as idist
import torch
from monai.data import CacheDataset, DataLoader, DistributedSampler
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.config import Run

_wrapped: list[DistributedDataParallel] = []  # networks of the process group that is open


def is_first_process() -> bool:
    """Return whether this process is the one that writes files and reports progress."""
    # some job schedulers set RANK for a single process too, so WORLD_SIZE is asked first
    return not _started_in_several_processes() or int(os.environ["RANK"]) == 0


def _started_in_several_processes() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_single_process() -> bool:
    """Return whether training runs in this process only."""
    return bool(idist.get_world_size() < 2)


@contextmanager
def process_group() -> Iterator[torch.device | None]:
    """Join the process group of `torchrun`, and leave it at the end of the `with` block.

    Yields:
        The device that this process trains on, or None for a single process, which chooses its
        own.
    """
    if not _started_in_several_processes():
        yield None
        return
    idist.initialize("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield idist.device()
    finally:
        # Gloo's threads end when the last reference to the group goes. Python must drop it, not
        # the wrapper's C++ part: that one waits for the threads with the GIL held, which they need
        # to free their tensors. Threads that live on abort the interpreter when it exits.
        for network in _wrapped:
            network.__dict__.clear()
        _wrapped.clear()
        idist.finalize()


def data_parallel(network: nn.Module) -> nn.Module:
    """Return the network wrapped in `DistributedDataParallel`; unchanged in a single process.

    The wrapper is of no use after the `with` block of `process_group`; the network is.
    """
    if is_single_process():
        return network
    on_gpu = idist.device().type == "cuda"
    devices = [idist.get_local_rank()] if on_gpu else None
    _wrapped.append(DistributedDataParallel(network, device_ids=devices))
    return _wrapped[-1]


def training_loader(dataset: CacheDataset, run: Run) -> DataLoader:
    """Return the loader of shuffled training batches.

    With several processes, each one loads its share of the cases.

    Args:
        dataset: cached training cases; an item is a list of patches.
        run: gives `cases_per_step`.
    """
    sampler = None
    if not is_single_process():
        # all processes need the same number of steps, because each step waits for all gradients
        sampler = DistributedSampler(dataset, even_divisible=True, shuffle=True)
    return DataLoader(
        dataset,
        batch_size=run.cases_per_step,
        shuffle=sampler is None,
        sampler=sampler,
        drop_last=True,
    )


def from_first_process(value: float) -> float:
    """Return the value of the first process. Every process has to call this."""
    return value if is_single_process() else float(idist.broadcast(value, src=0))


def mean_over_processes(value: float) -> float:
    """Return the mean of a value over all processes. Every process has to call this."""
    return float(idist.all_reduce(value) / idist.get_world_size())


def barrier() -> None:
    """Wait until every process has called this."""
    idist.barrier()
