from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline.batch import resources
from pipeline.batch.resources import allotted_cores, allotted_memory

GIB = 2**30


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of 64 cores and 256 GiB."""
    monkeypatch.setattr(resources, "_affinity", lambda: 64)
    monkeypatch.setattr(resources, "_machine_memory", lambda: 256 * GIB)


def group(folder: Path, **files: object) -> Path:
    """Write files of a control group; `__` stands for a dot."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n")
    return folder


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("max 100000", 64), ("400000 100000", 4), ("150000 100000", 2), ("10000 100000", 1)],
)
def test_quota_of_version_2(quota: str, cores: int, tmp_path: Path) -> None:
    """A part of a core counts as a core."""
    assert allotted_cores({}, group(tmp_path, cpu__max=quota)) == cores


@pytest.mark.parametrize(("quota", "cores"), [(-1, 64), (250000, 3), (50000, 1)])
def test_quota_of_version_1(quota: int, cores: int, tmp_path: Path) -> None:
    """It lies in the folder of its controller; -1 is no limit."""
    group(tmp_path / "cpu", cpu__cfs_quota_us=quota, cpu__cfs_period_us=100000)
    assert allotted_cores({}, tmp_path) == cores


def test_damaged_quotas_are_no_limits(tmp_path: Path) -> None:
    """Empty files, text and a period of 0."""
    for text in ("", "many", "100000 0", "100000"):
        assert allotted_cores({}, group(tmp_path, cpu__max=text)) == 64


@pytest.mark.parametrize("names", ["0::/a/b", "4:cpu,cpuacct:/a/b\n5:memory:/a/b"])
def test_groups_above_the_own_one_count(
    names: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The own group has no limit, the one above has one: of version 2, and of version 1."""
    original = resources._text
    proc = Path("/proc/self/cgroup")
    monkeypatch.setattr(resources, "_text", lambda path: names if path == proc else original(path))
    if names.startswith("0"):
        group(tmp_path / "a" / "b", cpu__max="max 100000", memory__max="max")
        group(tmp_path / "a", cpu__max="200000 100000", memory__max=2 * GIB)
    else:
        group(tmp_path / "cpu,cpuacct" / "a" / "b", cpu__cfs_quota_us=-1)
        group(tmp_path / "cpu,cpuacct" / "a", cpu__cfs_quota_us=200000, cpu__cfs_period_us=100000)
        group(tmp_path / "memory" / "a", memory__limit_in_bytes=2 * GIB)
    assert allotted_cores({}, tmp_path) == 2
    assert allotted_memory({}, tmp_path) == 2 * GIB


def test_slurm_states_the_cores_of_a_task(tmp_path: Path) -> None:
    """Those per task before those of the node; never more than the machine has."""
    assert allotted_cores({"SLURM_CPUS_ON_NODE": "12"}, tmp_path) == 12
    both = {"SLURM_CPUS_PER_TASK": "3", "SLURM_CPUS_ON_NODE": "12"}
    assert allotted_cores(both, tmp_path) == 3
    assert allotted_cores({"SLURM_CPUS_PER_TASK": "128"}, tmp_path) == 64
    assert allotted_cores({"SLURM_CPUS_PER_TASK": "0"}, tmp_path) == 1
    assert allotted_cores({"SLURM_CPUS_PER_TASK": "many"}, tmp_path) == 64


def test_memory_is_the_smallest_limit(tmp_path: Path) -> None:
    """Of the control group, of Slurm (in MiB, 0 for all of the node) and of the machine."""
    assert allotted_memory({}, tmp_path) == 256 * GIB
    assert allotted_memory({}, group(tmp_path, memory__max="max")) == 256 * GIB
    assert allotted_memory({}, group(tmp_path, memory__max=8 * GIB)) == 8 * GIB
    assert allotted_memory({"SLURM_MEM_PER_NODE": "2048"}, tmp_path) == 2 * GIB
    assert allotted_memory({"SLURM_MEM_PER_NODE": "0"}, tmp_path) == 8 * GIB
    unlimited = group(tmp_path / "v1" / "memory", memory__limit_in_bytes=9223372036854771712)
    assert allotted_memory({}, unlimited.parent) == 256 * GIB


def test_affinity_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A process that is bound to cores uses no others."""
    monkeypatch.undo()
    bound = set(list(os.sched_getaffinity(0))[:1])
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: bound)
    assert allotted_cores({}, tmp_path) == 1
