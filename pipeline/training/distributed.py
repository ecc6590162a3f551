"""One run in several processes, as `torchrun` starts them: one a GPU, each with its share of the cases.

The first process writes and decides; the others follow it. In a single process all of this does nothing.
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
    """Whether this process writes and prints."""
    return not _are_several() or int(os.environ["RANK"]) == 0


def _are_several() -> bool:
    """Whether `torchrun` started more than this one."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_single_process() -> bool:
    """Whether this is the only process."""
    return bool(idist.get_world_size() < 2)


@contextmanager
def process_group() -> Iterator[torch.device | None]:
    """Joins the processes that `torchrun` started; gives this one's device, or None where there is one process only."""
    if not _are_several():
        yield None
        return
    idist.initialize("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield idist.device()
    finally:
        idist.finalize()


def data_parallel(network: nn.Module) -> nn.Module:
    """The network whose gradients are the mean over all processes; itself where there is one."""
    if is_single_process():
        return network
    on_gpu = idist.device().type == "cuda"
    return DistributedDataParallel(network, device_ids=[idist.get_local_rank()] if on_gpu else None)


def training_loader(dataset: CacheDataset, run: Run) -> DataLoader:
    """A run's training batches, each case once an epoch, in some process."""
    share = (
        DistributedSampler(dataset, even_divisible=True, shuffle=True)
        if not is_single_process()
        else None
    )
    return DataLoader(
        dataset, batch_size=run.cases_per_step, shuffle=share is None, sampler=share, drop_last=True
    )


def from_first_process(value: float) -> float:
    """The first process's value of a number, in every process; all have to ask."""
    return value if is_single_process() else float(idist.broadcast(value, src=0))


def mean_over_processes(value: float) -> float:
    """A number's mean over the processes; all have to ask."""
    return float(idist.all_reduce(value) / idist.get_world_size())


def barrier() -> None:
    """Until all processes are here."""
    idist.barrier()
