from __future__ import annotations

import pytest

from pipeline.batch.shards import Shard, parse_shard
from pipeline.errors import ConfigError


def slurm(task: int, tasks: list[int], **more: str) -> dict[str, str]:
    """Return the variables that Slurm sets for one task of an array."""
    return {
        "SLURM_ARRAY_TASK_ID": str(task),
        "SLURM_ARRAY_TASK_MIN": str(min(tasks)),
        "SLURM_ARRAY_TASK_MAX": str(max(tasks)),
        "SLURM_ARRAY_TASK_COUNT": str(len(tasks)),
        **more,
    }


@pytest.mark.parametrize("count", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("size", [0, 1, 2, 15, 16, 17, 100])
def test_shards_are_a_partition(count: int, size: int) -> None:
    """Each item is in one shard, in order, and the sizes differ by one at most."""
    items = list(range(size))
    parts = [parse_shard(f"{k}/{count}").of(items) for k in range(1, count + 1)]
    assert sorted(item for part in parts for item in part) == items
    assert all(part == sorted(part) for part in parts)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize(
    "text", ["0/3", "4/3", "1/0", "0/0", "-1/3", "1/-3", "1", "a/b", "1/3/5", "", "1.0/3", " 1/3"]
)
def test_other_shards_are_refused(text: str) -> None:
    """The message shows what was given."""
    with pytest.raises(ConfigError, match=f"--shard {text}"):
        parse_shard(text, {})


@pytest.mark.parametrize(("first", "step", "count"), [(0, 1, 5), (1, 1, 8), (3, 1, 4), (1, 2, 4)])
def test_the_tasks_of_an_array_are_a_partition(first: int, step: int, count: int) -> None:
    """Wherever the numbers begin, and in steps."""
    tasks = list(range(first, first + count * step, step))
    more = {"SLURM_ARRAY_TASK_STEP": str(step)}
    shards = [parse_shard("slurm", slurm(task, tasks, **more)) for task in tasks]
    assert shards == [Shard(number, count) for number in range(1, count + 1)]


def test_an_array_without_a_step_has_step_1() -> None:
    """Older versions of Slurm do not state it."""
    assert parse_shard("slurm", slurm(2, [1, 2, 3])) == Shard(2, 3)


@pytest.mark.parametrize("tasks", [[1, 2, 4], [1, 5], [0, 1, 2, 9]])
def test_an_array_with_gaps_is_refused(tasks: list[int]) -> None:
    """Nobody would do the cases of the tasks that are missing."""
    for task in tasks:
        with pytest.raises(ConfigError, match="some are missing"):
            parse_shard("slurm", slurm(task, tasks))


def test_pods_of_an_indexed_job_count_from_0() -> None:
    """The index is that of the pod, the completions are all."""
    variables = {"JOB_COMPLETION_INDEX": "0", "JOB_COMPLETIONS": "4"}
    assert parse_shard("kubernetes", variables) == Shard(1, 4)
    with pytest.raises(ConfigError, match="part 5 of 4"):
        parse_shard("kubernetes", variables | {"JOB_COMPLETION_INDEX": "4"})


@pytest.mark.parametrize("text", ["slurm", "kubernetes"])
def test_missing_variables_are_refused(text: str) -> None:
    """The message names the first one and where it should come from."""
    with pytest.raises(ConfigError, match=r"is not set, expected a number: is this an? "):
        parse_shard(text, {})
