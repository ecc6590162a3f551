"""Parts of a batch for several jobs: the K-th of N, or the one that a scheduler numbers."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from pipeline.errors import ConfigError

T = TypeVar("T")
SLURM = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_MAX",
         "SLURM_ARRAY_TASK_COUNT")  # fmt: skip
KUBERNETES = ("JOB_COMPLETION_INDEX", "JOB_COMPLETIONS")


@dataclass(frozen=True, slots=True)
class Shard:
    """One of several parts.

    Attributes:
        number: from 1.
        count: of all parts.
    """

    number: int
    count: int

    def of(self, items: Sequence[T]) -> list[T]:
        """Return the items of this shard: every `count`-th one."""
        return list(items[self.number - 1 :: self.count])


def parse_shard(text: str, environment: Mapping[str, str] = os.environ) -> Shard:
    """Return a shard.

    Args:
        text: `K/N` with K from 1 to N; `slurm` for the task of a job array; `kubernetes` for the
            pod of an indexed job.
        environment: where the schedulers' variables are.

    Raises:
        ConfigError: another text, a variable that is missing, or an array with gaps, whose other
            tasks nobody would do.
    """
    if text == "slurm":
        return _slurm_shard(environment)
    if text == "kubernetes":
        index, count = _integers(environment, KUBERNETES, "an indexed job of Kubernetes")
        return _checked(index + 1, count, text)
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None:
        raise ConfigError(f"--shard {text}: expected K/N such as 1/8, slurm or kubernetes")
    return _checked(int(match[1]), int(match[2]), text)


def _slurm_shard(environment: Mapping[str, str]) -> Shard:
    task, lowest, highest, count = _integers(environment, SLURM, "a Slurm job array")
    step = int(environment.get("SLURM_ARRAY_TASK_STEP", "") or 1)
    if lowest + (count - 1) * step != highest or (task - lowest) % step:
        raise ConfigError(
            f"--shard slurm: the array has {count} tasks from {lowest} to {highest} in steps of "
            f"{step}, so some are missing and their cases would not be done; expected an array "
            "without gaps, such as --array=1-8"
        )
    return _checked((task - lowest) // step + 1, count, "slurm")


def _integers(environment: Mapping[str, str], names: Sequence[str], where: str) -> list[int]:
    values = []
    for name in names:
        text = environment.get(name, "")
        if not text.isdigit():
            raise ConfigError(
                f"--shard: {name} is {text or 'not set'}, expected a number: is this {where}?"
            )
        values.append(int(text))
    return values


def _checked(number: int, count: int, text: str) -> Shard:
    if not 1 <= number <= count:
        raise ConfigError(f"--shard {text}: part {number} of {count}, expected 1 to {count}")
    return Shard(number, count)
