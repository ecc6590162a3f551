"""The cores and the memory that this process may use, which are often fewer than the machine's."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from math import ceil
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
NO_LIMIT = 2**60  # cgroup v1 writes a number near 2**63 where there is no limit


def allotted_cores(environment: Mapping[str, str] = os.environ, cgroup: Path = CGROUP) -> int:
    """Return the number of cores that this process may use.

    It is the smallest of the process's affinity, the quota of its control group, and the cores that
    Slurm gave the task.

    Args:
        environment: of the process.
        cgroup: where control groups are mounted.
    """
    counts = [_affinity()]
    for folder in _cgroup_folders(cgroup):
        quota = _quota(folder)
        if quota is not None:
            counts.append(max(1, ceil(quota)))
    for name in ("SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE"):
        if environment.get(name, "").isdigit():
            counts.append(int(environment[name]))
            break
    return max(1, min(counts))


def allotted_memory(environment: Mapping[str, str] = os.environ, cgroup: Path = CGROUP) -> int:
    """Return the bytes of memory that this process may use: the machine's, or a smaller limit.

    Args:
        environment: of the process.
        cgroup: where control groups are mounted.
    """
    sizes = [_machine_memory()]
    for folder in _cgroup_folders(cgroup):
        for name in ("memory.max", "memory.limit_in_bytes"):
            text = _text(folder / name)
            if text.isdigit() and int(text) < NO_LIMIT:
                sizes.append(int(text))
    per_node = environment.get("SLURM_MEM_PER_NODE", "")
    if per_node.isdigit() and int(per_node) > 0:
        sizes.append(int(per_node) * 2**20)
    return min(sizes)


def _affinity() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS and Windows
        return os.cpu_count() or 1


def _machine_memory() -> int:
    with suppress(ValueError, OSError, AttributeError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 8 * 2**30  # Windows: a guess, for the number of jobs only


def _cgroup_folders(cgroup: Path) -> list[Path]:
    """Return the folders of this process's control group and of those that contain it."""
    folders = [cgroup, cgroup / "cpu", cgroup / "memory"]
    for line in _text(Path("/proc/self/cgroup")).splitlines():
        _, controllers, name = line.split(":", 2)
        base = cgroup / controllers if controllers else cgroup
        path = base / name.lstrip("/")
        folders += [path, *(parent for parent in path.parents if parent.is_relative_to(cgroup))]
    return list(dict.fromkeys(folders))


def _quota(folder: Path) -> float | None:
    """Return the cores that a control group may use, None where it has no limit."""
    quota, period = [*_text(folder / "cpu.max").split(), "", ""][:2]
    if not quota:
        quota = _text(folder / "cpu.cfs_quota_us")
        period = _text(folder / "cpu.cfs_period_us")
    if quota.isdigit() and period.isdigit() and int(period) > 0:
        return int(quota) / int(period)
    return None


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""
