"""The job array of docs/cluster.md on a real Slurm, killed and requeued: a plain run's results."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from phantom import make_bundle, nifti, save, smooth
from same_results import assert_same_results
from slurm_node import missing, one_node_slurm, run

pytestmark = pytest.mark.system
ROOT = Path(__file__).parent.parent.parent
SCRIPTS = ROOT / "scripts" / "cluster"
TASKS = ("1", "2", "3", "4")  # of the array in that script


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of a Slurm in which `volseg` is installed."""
    reason = missing()
    if reason:
        pytest.skip(reason)
    with one_node_slurm(tmp_path_factory.mktemp("slurm")) as environment:
        programs = Path(sys.executable).parent
        yield environment | {"PATH": f"{programs}{os.pathsep}{environment['PATH']}"}


@pytest.fixture(params=["phantoms", "hippocampus"])
def study(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str]:
    """A folder of volumes, and the bundle to segment them with."""
    folder = tmp_path / "study"
    if request.param == "phantoms":
        for number in range(24):
            shape = (41, 52 + number % 3, 37)
            save(folder / f"sub-{number:02d}.nii.gz", nifti(smooth(shape, seed=number)))
        return folder, str(make_bundle(tmp_path / "bundle"))
    folder.mkdir()
    crops = request.getfixturevalue("data") / "hippocampus" / "imagesTr"
    for path in sorted(crops.glob("hippocampus_*.nii.gz"))[:40]:
        shutil.copy(path, folder)
    return folder, "hippocampus_mr_3d"


def holders(out: Path) -> dict[str, int]:
    """Task of the array → process of the run that has a claim now."""
    found = {}
    for path in (out / ".volseg" / "claims").glob("*/*"):
        with suppress(OSError, ValueError):
            pid = int(json.loads(path.read_text())["pid"])
            variables = Path(f"/proc/{pid}/environ").read_text().split("\0")
            task = next(item for item in variables if item.startswith("SLURM_ARRAY_TASK_ID="))
            found[task.partition("=")[2]] = pid
    return found


def records(out: Path) -> list[Path]:
    """The records of cases that are done."""
    return list((out / ".volseg" / "records").glob("*/*.json"))


def wait_for(condition: Callable[[], Any], seconds: float, what: Callable[[], str]) -> Any:
    """Wait until a condition is true, and return its value."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, what()
        time.sleep(0.1)
    return value


def segment_plainly(folder: Path, out: Path, options: list[str]) -> None:
    """Segment in one process."""
    command = [sys.executable, "-m", "pipeline.cli", "segment", str(folder), "-o", str(out)]
    subprocess.run([*command, *options, "--jobs", "1"], check=True, capture_output=True)


def test_an_array_that_is_killed_and_requeued(
    slurm: dict[str, str], study: tuple[Path, str], tmp_path: Path
) -> None:
    """One task is killed by `kill -9` and requeued by hand, another one requeued as it runs."""
    folder, bundle = study
    out, logs = tmp_path / "out", tmp_path / "logs"
    logs.mkdir()
    options = ["--bundle", bundle, "--device", "cpu"]
    submit = [
        "sbatch",
        "--parsable",
        f"--chdir={logs}",
        str(SCRIPTS / "slurm_array.sh"),
        str(folder),
        str(out),
    ]
    job = run(slurm, *submit, *options).strip()
    assert job.isdigit(), job

    def state(task: str) -> str:
        return run(slurm, "squeue", "--noheader", "--states=all", f"--jobs={job}_{task}", "-o%T")

    def story() -> str:
        texts = [path.read_text() for path in sorted(logs.iterdir())]
        return "\n".join([run(slurm, "squeue", "--states=all"), *texts])

    def log(task: str) -> str:
        path = logs / f"volseg-{job}_{task}.log"
        return path.read_text() if path.exists() else ""

    def two_under_way() -> dict[str, int]:
        found = {task: pid for task, pid in holders(out).items() if "] done " in log(task)}
        return found if len(found) >= 2 else {}

    first, second, *_ = wait_for(two_under_way, 300, story).items()
    os.kill(first[1], signal.SIGKILL)
    assert run(slurm, "scontrol", "requeue", f"{job}_{second[0]}") == ""
    done = len(records(out))
    assert done < len(list(folder.iterdir()))
    wait_for(lambda: "FAILED" in state(first[0]), 60, story)
    assert run(slurm, "scontrol", "requeue", f"{job}_{first[0]}") == ""
    wait_for(lambda: all("COMPLETED" in state(task) for task in TASKS), 600, story)

    segment_plainly(folder, tmp_path / "plain", options)
    assert_same_results(out, tmp_path / "plain")
    for task in (first[0], second[0]):
        assert "of them from an earlier run" in log(task), story()
    assert "interrupted (SIGTERM)" in log(second[0])


@pytest.mark.parametrize("study", ["phantoms"], indirect=True)
def test_workers_of_dask_on_slurm(
    slurm: dict[str, str], study: tuple[Path, str], tmp_path: Path
) -> None:
    """One worker is killed as it computes a case; its nanny starts another one."""
    pytest.importorskip("distributed")
    folder, bundle = study
    out, logs = tmp_path / "out", tmp_path / "logs"
    logs.mkdir()
    options = ["--bundle", bundle, "--device", "cpu"]
    script = [str(SCRIPTS / "slurm_dask.sh"), str(folder), str(out)]
    # Dask asks nobody who they are: only this machine may reach it
    loopback = slurm | {"DASK_INTERFACE": "lo"}
    job = run(loopback, "sbatch", "--parsable", f"--chdir={logs}", *script, *options).strip()
    assert job.isdigit(), job

    def state() -> str:
        return run(slurm, "squeue", "--noheader", "--states=all", f"--jobs={job}", "-o%T")

    def log() -> str:
        return "".join(path.read_text() for path in logs.glob("*.log"))

    def computing() -> int:
        """The process of a worker that computes a case."""
        for path in (out / ".volseg" / "begun").glob("*/*"):
            with suppress(OSError):
                match = re.search(r"process (\d+)", path.read_text())
                if match and len(records(out)) >= 3:
                    return int(match[1])
        return 0

    victim = wait_for(computing, 300, log)
    assert set(re.findall(r"tcp://([\d.]+):", log())) == {"127.0.0.1"}
    os.kill(victim, signal.SIGKILL)
    wait_for(lambda: state() in ("COMPLETED\n", "FAILED\n"), 600, log)
    assert state() == "COMPLETED\n", log()
    assert "a process died with 1 cases: Dask's worker" in (out / "volseg.log").read_text()
    plain = tmp_path / "plain"
    segment_plainly(folder, plain, options)
    assert_same_results(out, plain)
    assert not list(logs.glob("*.json"))
