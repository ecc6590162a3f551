"""The training cases that stay loaded, as many as their memory allows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from monai.data import CacheDataset

from pipeline.batch import allotted_memory
from pipeline.config import Run
from pipeline.log import LOGGER
from pipeline.training.distributed import is_first_process
from pipeline.transforms import TrainingTransform
from pipeline.types import Case

GB = 2**30
# of the memory that the process may use: the rest is for the network, its gradients and the batches
CACHE_SHARE = 0.5


class CaseCache(CacheDataset):
    """MONAI's `CacheDataset`, which keeps as many cases as fit into a number of bytes.

    Cases are loaded in their order. A case that comes up several times is kept once. The cases that
    do not fit are read and preprocessed each time that they are used; the patches are the same.
    Memory of a GPU does not count: `ToGpud` has its own limit.

    Args:
        data: training cases.
        transform: from a case to its patches.
        limit: bytes.
    """

    _hash_keys: list[Any]

    def __init__(self, data: Sequence[Any], transform: TrainingTransform, limit: float) -> None:
        self.limit = limit
        super().__init__(
            data, transform, hash_as_key=True, progress=False, num_workers=1, copy_cache=True
        )

    def _fill_cache(self, indices: Any = None) -> list[Any]:
        kept: list[Any] = []
        size = 0
        for index in indices or []:
            if self.limit <= 0:
                break
            item = self._load_cache_item(index)
            size += host_bytes(item)
            if size > self.limit:
                break
            kept.append(item)
        if len(kept) < len(indices or []) and is_first_process():
            LOGGER.info(
                "%d of %d training cases stay in memory (%.1f GB); the others are read in each "
                "epoch: give cache_gb more to keep them too",
                len(kept),
                len(indices),
                self.limit / GB,
            )
        self.cache_num = len(kept)
        self._hash_keys = self._hash_keys[: len(kept)]
        return kept


def training_dataset(data: Sequence[Case], transform: TrainingTransform, run: Run) -> CaseCache:
    """Return the dataset of training patches, with the cache that `run.cache_gb` allows.

    Args:
        data: training cases.
        transform: from a case to its patches.
        run: gives `cache_gb`; None takes half of the memory that this process may use. Processes of
            one machine share that.
    """
    if run.cache_gb is not None:
        limit = run.cache_gb * GB
    else:
        limit = CACHE_SHARE * allotted_memory() / max(1, idist.get_nproc_per_node())
    return CaseCache(data, transform, limit)


def host_bytes(item: Any) -> int:
    """Return the size of all tensors and arrays in the host's memory that an object holds."""
    if isinstance(item, torch.Tensor):
        return item.element_size() * item.numel() if item.device.type == "cpu" else 0
    if isinstance(item, np.ndarray):
        return int(item.nbytes)
    if isinstance(item, Mapping):
        return sum(host_bytes(value) for value in item.values())
    if isinstance(item, list | tuple):
        return sum(host_bytes(value) for value in item)
    if is_dataclass(item):
        return sum(host_bytes(getattr(item, part.name)) for part in fields(item))
    return 0
