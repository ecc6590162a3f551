"""Claims: who works on which case, so that runs that share an output folder share the work.

A run has a file with its machine and process, whose time of modification is its heartbeat. Its
claim of a case is a hard link to that file: the link is made by one run only, holds from its first
moment who made it, and gets older with the run's heartbeat. A claim ends with the case. The claim
of a run that died is removed by the next one that wants the case: on the same machine a run is
dead when its process is gone, on another machine when its heartbeat is older than a lease, by the
clock of the file system.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from pipeline.batch.outputs import OutputFolder
from pipeline.errors import ConfigError
from pipeline.io import TEMPORARY_SUFFIX, host_code, locked

LEASE_SECONDS = 300.0  # network file systems may show a time of modification a minute late
HEARTBEAT_SECONDS = 20.0
OLD_TEMPORARY_SECONDS = 3600.0  # no file takes an hour to write
OLD_FOLDER_SECONDS = 7 * 86400.0  # a folder of temporary images lasts as long as its case


@dataclass(frozen=True, kw_only=True, slots=True)
class Holder:
    """The process of a run.

    Attributes:
        run: a random name.
        host: name of the machine.
        boot: identifier of the machine's start, empty where the system has none.
        namespace: of process numbers, because containers count their own.
        pid: number of the process.
        born: start of the process in clock ticks, because numbers are used again.
    """

    run: str
    host: str
    boot: str
    namespace: str
    pid: int
    born: str

    @classmethod
    def this_process(cls) -> Holder:
        """Return the holder of a new run of this process."""
        return cls(
            run=uuid.uuid4().hex,
            host=socket.gethostname(),
            boot=_text(Path("/proc/sys/kernel/random/boot_id")),
            namespace=_namespace(),
            pid=os.getpid(),
            born=_born(os.getpid()),
        )

    def is_on_this_machine(self) -> bool:
        """Return whether `pid` can be looked up here: same machine, same namespace of numbers."""
        return self.host == socket.gethostname() and self.namespace == _namespace()


@dataclass(frozen=True, slots=True)
class Death:
    """The run that claimed a case is dead.

    Attributes:
        by_restart: whether the machine was started again since, which explains the death.
    """

    by_restart: bool


class Claims:
    """The claims of one run in an output folder.

    Use it as a context manager: the run's file exists and beats inside it.

    Args:
        out: the output folder.
    """

    def __init__(self, out: OutputFolder) -> None:
        self.out = out
        self.holder = Holder.this_process()
        self.file = out.runs / f"{self.holder.run}.json"
        self._stop = threading.Event()
        self._beat: threading.Thread | None = None
        self._last_beat = time.monotonic()

    def __enter__(self) -> Self:
        try:
            self._write_file()
        except OSError as error:
            raise ConfigError(
                f"{self.out.root}: results cannot be written there: {error.strerror}"
            ) from error
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        if self._beat is not None:
            self._beat.join()
        with suppress(OSError):
            self.file.unlink()

    def beat_in_thread(self) -> None:
        """Start a thread that beats, for a run whose own thread computes."""

        def beat() -> None:
            while not self._stop.wait(HEARTBEAT_SECONDS):
                self.beat()

        self._beat = threading.Thread(target=beat, name="volseg-heartbeat", daemon=True)
        self._beat.start()

    def beat(self) -> None:
        """Renew the lease of all claims, if it is time to."""
        if time.monotonic() - self._last_beat >= HEARTBEAT_SECONDS / 2:
            self._last_beat = time.monotonic()
            with suppress(OSError):
                os.utime(self.file)

    def take(self, case: str) -> bool | Death:
        """Claim a case.

        Returns:
            True; False where a living run has claimed it; or the death of the run that had claimed
            it, whose claim is now removed, so that the case may be claimed.

        Raises:
            OSError: the file system does not allow it.
            RunStoppedError: the output folder was removed or replaced.
        """
        path = self.out.claim(case)
        for _ in range(2):
            if self._link(path):
                return True
            claimed = _holder(path)
            if claimed is None and not path.exists():
                continue  # released at this moment
            if not self._is_dead(path, claimed):
                return False
            return self._remove_dead(path, claimed)
        return False

    def release(self, case: str) -> None:
        """End the claim of a case, unless another run has found it dead and taken it over."""
        with suppress(OSError):
            if holds_claim(self.out, self.holder.run, case):
                self.out.claim(case).unlink()

    def remove_dead(self, case: str) -> None:
        """Remove the claim of a case that is done, if the run that made it is dead.

        A run that was killed between the record and the end of its claim leaves one that no other
        run wants.
        """
        path = self.out.claim(case)
        if not path.exists():
            return
        with suppress(OSError):
            claimed = _holder(path)
            if self._is_dead(path, claimed):
                self._remove_dead(path, claimed)

    def sweep(self) -> None:
        """Remove what dead runs left: their files and their temporary files."""
        for path in list(self.out.runs.glob("*.json")):
            if path != self.file and self._is_dead(path, _holder(path)):
                with suppress(OSError):
                    path.unlink()
        now = self._now()
        for path in list(self.out.staging.glob(f".*{TEMPORARY_SUFFIX}")):
            with suppress(OSError):
                age, is_folder = now - path.stat().st_mtime, path.is_dir()
                old = age > (OLD_FOLDER_SECONDS if is_folder else OLD_TEMPORARY_SECONDS)
                if not old and not _is_left_behind(path):
                    continue
                if is_folder and not path.is_symlink():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink()

    def _link(self, path: Path) -> bool:
        """Make the claim, atomically; return whether this run made it."""
        for _ in range(2):
            try:
                os.link(self.file, path)
                return True
            except FileExistsError:
                return False
            except FileNotFoundError:
                self.out.check(path)  # a folder that was removed is not made again
                path.parent.mkdir(parents=True, exist_ok=True)
                if not self.file.exists():  # another machine took this run for dead
                    self._write_file()
            except OSError:  # a file system without hard links
                return self._create(path)
        return False

    def _write_file(self) -> None:
        self.file.write_text(json.dumps(asdict(self.holder)), encoding="utf-8")

    def _create(self, path: Path) -> bool:
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            return False
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(asdict(self.holder), file)
        return True

    def _is_dead(self, path: Path, holder: Holder | None) -> bool:
        if holder is not None and holder.is_on_this_machine():
            restarted = holder.boot != self.holder.boot
            return restarted or _born(holder.pid) != holder.born
        with suppress(OSError):
            return self._now() - self._last_sign(path, holder) > LEASE_SECONDS
        return False

    def _last_sign(self, path: Path, holder: Holder | None) -> float:
        """Return the time of the last heartbeat, which a claim that is no link does not get."""
        times = [path.stat().st_mtime]
        if holder is not None:
            with suppress(OSError):
                times.append((self.out.runs / f"{holder.run}.json").stat().st_mtime)
        return max(times)

    def _remove_dead(self, path: Path, dead: Holder | None) -> bool | Death:
        """Remove a dead run's claim, unless another run has done so."""
        with locked(self.out.lock):
            present = _holder(path)
            if present != dead or not path.exists():
                return False
            with suppress(OSError):
                path.unlink()
        restarted = dead is not None and (
            dead.is_on_this_machine() and dead.boot != self.holder.boot
        )
        return Death(by_restart=restarted)

    def _now(self) -> float:
        """Return the time by the clock of the file system."""
        with suppress(OSError):
            os.utime(self.file)
            return self.file.stat().st_mtime
        return time.time()


@contextmanager
def claims_of_run(out: OutputFolder) -> Iterator[Claims]:
    """Yield the claims of a new run, after what dead runs left was removed.

    At its end, what its own dead workers left is removed.
    """
    with Claims(out) as claims:
        claims.sweep()
        try:
            yield claims
        finally:
            claims.sweep()


def holds_claim(out: OutputFolder, run: str, case: str) -> bool:
    """Return whether a run still holds its claim of a case, which another may have found dead."""
    found = _holder(out.claim(case))
    return found is not None and found.run == run


def _holder(path: Path) -> Holder | None:
    try:
        return Holder(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _is_left_behind(path: Path) -> bool:
    """Return whether the process on this machine that wrote a temporary file is gone."""
    host, pid, *_ = [*path.name[1:].split("-"), ""]
    return host == host_code() and pid.isdigit() and not _born(int(pid))


def _born(pid: int) -> str:
    """Return when a process started, in clock ticks; empty where there is no such process."""
    if Path("/proc/self/stat").exists():
        text = _text(Path(f"/proc/{pid}/stat"))
        # the name of the program may hold spaces and brackets, and comes before these fields
        fields = text.rpartition(")")[2].split()
        return fields[19] if len(fields) > 19 and fields[0] not in "ZX" else ""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except OSError:
        return "unknown"
    return "unknown"


def _namespace() -> str:
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
