"""A Slurm of one node for tests: munge, slurmctld and slurmd in a folder of their own, as root."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue")
# more than the machine may have, so that all tasks of an array run at the same time
CPUS, MEMORY_MB = 16, 65536
CONFIGURATION = """
ClusterName=volseg
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# a job that is requeued starts again only when its credential has expired
AuthInfo=socket={folder}/munge.socket,cred_expire=5
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=20
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmdSpoolDir={folder}/slurmd
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SchedulerType=sched/builtin
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory={memory} State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """Return why no Slurm can be started here; empty if one can."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    if absent:
        return f"{', '.join(absent)} not installed: scripts/test-system installs them"
    return "" if os.geteuid() == 0 else "Slurm's daemons are started as root"


def _path() -> str:
    return os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


@contextmanager
def one_node_slurm(folder: Path) -> Iterator[dict[str, str]]:
    """Run a Slurm whose state is in a folder, which listens on this machine's loopback.

    Yields:
        the environment in which its commands find it.
    """
    host = socket.gethostname().split(".")[0]
    for name in ("state", "slurmd"):
        (folder / name).mkdir(parents=True)
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    configuration = folder / "slurm.conf"
    configuration.write_text(
        CONFIGURATION.format(
            host=host,
            folder=folder,
            cpus=CPUS,
            memory=MEMORY_MB,
            controller_port=free_port(),
            node_port=free_port(),
        )
    )
    environment = {**os.environ, "PATH": _path(), "SLURM_CONF": str(configuration)}
    munge = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "log", "pid", "seed")]
    daemons: list[subprocess.Popen[bytes]] = []

    def start(*command: str) -> None:
        with open(folder / f"{command[0]}.out", "wb") as out:
            daemons.append(
                subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT)
            )

    try:
        start("munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *munge)
        wait_until(lambda: (folder / "munge.socket").exists(), 20)
        start("slurmctld", "-D", "-f", str(configuration))
        start("slurmd", "-D", "-f", str(configuration), "-N", host)
        wait_until(lambda: "idle" in run(environment, "sinfo", "--noheader", "-o", "%T"), 60)
        yield environment
    finally:
        with suppress(subprocess.SubprocessError, OSError):
            run(environment, "scancel", "--user=root")
        for process in reversed(daemons):
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


def run(environment: dict[str, str], *command: str) -> str:
    """Return what a command of Slurm prints."""
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    return done.stdout + done.stderr


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    """Wait until a function returns True."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened in time"
        time.sleep(0.1)


def free_port() -> int:
    """Return a port of the loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
