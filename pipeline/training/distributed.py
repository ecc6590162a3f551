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


def is_first_process() -> bool:
    """Return whether this process writes files and reports progress."""
    # job scripts may set RANK for a single process as well
    return not _started_in_several_processes() or int(os.environ["RANK"]) == 0


def _started_in_several_processes() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_single_process() -> bool:
    """Return whether no other process trains with this one."""
    return bool(idist.get_world_size() < 2)


@contextmanager
def process_group() -> Iterator[torch.device | None]:
    """Connect the processes that `torchrun` started.

    Yields:
        This process's device; None for a single process.
    """
    if not _started_in_several_processes():
        yield None
        return
    idist.initialize("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield idist.device()
    finally:
        idist.finalize()


def data_parallel(network: nn.Module) -> nn.Module:
    """Return a network whose gradients are averaged over all processes; itself for a single one."""
    if is_single_process():
        return network
    on_gpu = idist.device().type == "cuda"
    return DistributedDataParallel(network, device_ids=[idist.get_local_rank()] if on_gpu else None)


def training_loader(dataset: CacheDataset, run: Run) -> DataLoader:
    """Return the training batches of this process; an epoch has each case in one process."""
    sampler = None
    if not is_single_process():
        # processes with unequally many steps would wait for each other for ever
        sampler = DistributedSampler(dataset, even_divisible=True, shuffle=True)
    return DataLoader(
        dataset,
        batch_size=run.cases_per_step,
        shuffle=sampler is None,
        sampler=sampler,
        drop_last=True,
    )


def from_first_process(value: float) -> float:
    """Return the first process's value in every process; all of them have to call this."""
    return value if is_single_process() else float(idist.broadcast(value, src=0))


def mean_over_processes(value: float) -> float:
    """Return the mean of a number over the processes; all of them have to call this."""
    return float(idist.all_reduce(value) / idist.get_world_size())


def barrier() -> None:
    """Wait until all processes have called this."""
    idist.barrier()
