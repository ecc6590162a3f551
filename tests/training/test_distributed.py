"""One run in two processes on the CPU, as torchrun starts them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from ignite.engine import Engine
from phantom import make_bundle, run_settings

from pipeline.bundle.check import check_bundle
from pipeline.config.paths import BundlePaths
from pipeline.io.tables import read_csv
from pipeline.training import optimisation
from pipeline.training.distributed import (
    from_first_process,
    is_first_process,
    mean_over_processes,
    process_group,
)
from pipeline.training.optimisation import Budget
from pipeline.training.trainer import read_run


def start(bundle: Path, data: Path, *arguments: str) -> subprocess.Popen[str]:
    """`volseg train` in two processes of one thread each."""
    _, content = read_run(
        bundle / "configs" / "run.yaml",
        run_settings(bundle, data, batch_size=1, epochs=6, repeats=25),
    )
    config = bundle.parent / f"{bundle.name}.yaml"
    config.write_text(yaml.safe_dump(content))
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    train = ["-m", "pipeline.cli", "train", str(config), *arguments]
    command = [sys.executable, "-m", *torchrun, *train]
    return subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )


def rows(bundle: Path) -> list[dict[str, str]]:
    return [
        {key: value for key, value in row.items() if key != "seconds"}
        for row in read_csv(bundle / "train/history.csv")
    ]


@pytest.mark.slow
def test_two_processes_are_one_run_that_can_be_killed(tmp_path: Path, dataset: Path) -> None:
    """They share the cases, one of them writes, and a killed run is resumed to the same end."""
    labels = {"background": 0, "bright": 1}
    whole, cut = (make_bundle(tmp_path / name, labels=labels) for name in ("whole", "cut"))
    process = start(whole, dataset)
    stderr = process.communicate()[1]
    assert process.returncode == 0, stderr
    assert stderr.count("epoch 6 of 6") == stderr.count("trained; the weights") == 1
    assert len(rows(whole)) == 6
    assert check_bundle(whole).errors == {}

    process = start(cut, dataset)
    while process.poll() is None and len(rows(cut)) < 2:
        time.sleep(0.05)
    for pid in [
        str(process.pid),
        *Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split(),
    ]:
        os.kill(int(pid), signal.SIGKILL)
    process.communicate()
    assert BundlePaths(cut).checkpoint.is_file()
    process = start(cut, dataset, "--resume")
    stderr = process.communicate()[1]
    assert process.returncode == 0, stderr
    assert [row["epoch"] for row in rows(cut)] == [row["epoch"] for row in rows(whole)]
    assert rows(cut)[0] == rows(whole)[0]
    assert float(rows(cut)[-1]["loss"]) == pytest.approx(float(rows(whole)[-1]["loss"]), rel=0.02)
    assert check_bundle(cut).errors == {}


FAILS_IN_GROUP = """
import sys
from contextlib import suppress
from pathlib import Path

import torch

from pipeline.training.distributed import barrier, data_parallel, mean_over_processes, process_group

with suppress(ZeroDivisionError), process_group():
    network = data_parallel(torch.nn.Linear(3, 2))
    network(torch.ones(4, 3)).sum().backward()
    mean_over_processes(1.0)
    barrier()
    1 / 0
threads = [(path / "comm").read_text() for path in Path("/proc/self/task").iterdir()]
sys.exit(any("gloo" in name for name in threads))
"""


@pytest.mark.slow
def test_no_thread_of_the_group_outlives_it(tmp_path: Path) -> None:
    """One that frees a tensor while the interpreter exits would abort the process."""
    script = tmp_path / "script.py"
    script.write_text(FAILS_IN_GROUP)
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, "-m", *torchrun, str(script)],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


def test_time_is_that_of_the_first_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """All processes then end after the same step and have one learning rate."""
    seconds_of_first = iter([10.0, 10.0, 20.0, 30.0, 30.0, 30.0])
    monkeypatch.setattr(optimisation, "from_first_process", lambda value: next(seconds_of_first))
    monkeypatch.setattr(optimisation, "is_single_process", lambda: False)
    ticks = iter(range(100))
    budget = Budget(1.0, now=lambda: float(next(ticks)))
    trainer = Engine(lambda engine, batch: None)
    budget.attach(trainer)
    trainer.run([1, 2, 3])
    assert budget.spent() in (20.0, 30.0)  # none of the ticks of its own clock
    assert 0 < budget.used() < 1


def test_a_single_process_writes_and_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if a job script has set RANK."""
    monkeypatch.setenv("RANK", "3")
    with process_group() as device:
        assert device is None
    assert is_first_process()
    assert mean_over_processes(2.5) == from_first_process(2.5) == 2.5
