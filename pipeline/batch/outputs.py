"""What lies where in an output folder, and which names of cases fit into it."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pipeline.errors import ConfigError, RunStoppedError
from pipeline.io import DICOM_ENDINGS, LABELS_ENDING, RESULT_ENDINGS
from pipeline.types import Case

CASES, VOLUMES, RUN, LOG = "cases.csv", "volumes.csv", "run.json", "volseg.log"
QUALITY = "quality.csv"
STATE = ".volseg"
NAME_BYTES = 255  # of a file name on ext4, XFS, APFS and NTFS
KEY_LETTERS = 32  # hexadecimal letters of a case's key: collisions are out of the question
# names that Windows reserves for devices, with any suffix
RESERVED = {"CON", "PRN", "AUX", "NUL"} | {f"{d}{n}" for d in ("COM", "LPT") for n in range(1, 10)}
WINDOWS_FORBIDDEN = set('<>:"|?*\\')


def output_path(output_dir: Path, case: str) -> Path:
    """Return where a case's label map is written."""
    return output_dir / f"{case}{LABELS_ENDING}"


def output_name(case: Case, ending: str) -> str:
    """Return the relative path of an output of a case.

    Args:
        case: a case; its `outputs` may give other names than its own with the ending.
        ending: which output: one of `RESULT_ENDINGS`.
    """
    return case.get("outputs", {}).get(ending, f"{case['case']}{ending}")


def case_endings(case: Case, endings: Sequence[str]) -> tuple[str, ...]:
    """Return the endings of the files that a case gets.

    Args:
        case: a case; its `dicom` names DICOM objects that it gets besides.
        endings: of the files that all cases get.
    """
    return (*endings, *(DICOM_ENDINGS[kind] for kind in case.get("dicom", ())))


def name_problem(case: str, *, windows: bool = sys.platform == "win32") -> str:
    """Return why a name cannot be that of an output; empty if it can.

    Args:
        case: a relative path without suffix, with forward slashes.
        windows: whether the rules of Windows apply, which reserves some names and characters.
    """
    parts = PurePosixPath(case).parts
    if not parts or "\0" in case:
        return "the name is empty or holds a NUL character"
    if case.startswith("/") or ".." in parts or (windows and ":" in parts[0]):
        return "the name leads out of the output folder; expected a relative path without `..`"
    if str(PurePosixPath(case)) != case:
        return f"the name is another way to write {PurePosixPath(case)}: give that"
    if parts[0] == STATE:
        return f"the name begins with {STATE}, which is where volseg keeps its records"
    longest = max(len(ending) for ending in RESULT_ENDINGS)
    for part in parts[:-1]:
        if len(os.fsencode(part)) > NAME_BYTES:
            return f"a folder's name has {len(os.fsencode(part))} bytes, at most {NAME_BYTES} fit"
    size = len(os.fsencode(parts[-1]))
    if size + longest > NAME_BYTES:
        return (
            f"the name has {size} bytes, at most {NAME_BYTES - longest} fit, because the name of "
            "the output is longer; rename the file"
        )
    return _windows_problem(parts) if windows else ""


def _windows_problem(parts: tuple[str, ...]) -> str:
    for part in parts:
        if part.split(".")[0].rstrip(" ").upper() in RESERVED:
            return f"{part} is a name that Windows reserves"
        if part.endswith((".", " ")) or WINDOWS_FORBIDDEN & set(part):
            return f"{part} is no name of a file on Windows"
    return ""


@dataclass(frozen=True, slots=True)
class OutputFolder:
    """An output folder while a run writes into it.

    Attributes:
        root: the folder.
        inode: of the folder when the run began, by which a folder that was replaced is noticed.
    """

    root: Path
    inode: int = 0

    @classmethod
    def create(cls, root: Path) -> OutputFolder:
        """Make the folder and the folders of volseg's state where they do not exist.

        Raises:
            ConfigError: they cannot be made.
        """
        folder = cls(root)
        try:
            for path in (folder.staging, folder.runs, folder.suspects):
                path.mkdir(parents=True, exist_ok=True)
            return cls(root, root.stat().st_ino)
        except OSError as error:
            raise ConfigError(
                f"{root}: results cannot be written there: {error.strerror}"
            ) from error

    def check(self, path: Path) -> None:
        """Check that the folder is still there and that a path does not lead out of it.

        Raises:
            RunStoppedError: the folder was removed or replaced during the run.
        """
        try:
            present = self.root.stat().st_ino == self.inode and self.state.is_dir()
        except OSError:
            present = False
        if not present:
            raise RunStoppedError(
                f"{self.root}: the output folder was removed or replaced during the run; "
                "what was written is lost: start again"
            )
        if not path.parent.resolve().is_relative_to(self.root.resolve()):
            raise RunStoppedError(f"{path}: a link leads out of the output folder; remove the link")

    @property
    def state(self) -> Path:
        """The folder of records, claims and temporary files."""
        return self.root / STATE

    @property
    def staging(self) -> Path:
        """Where files are written before they are renamed to their final names."""
        return self.state / "staging"

    @property
    def runs(self) -> Path:
        """One file per run that is under way; its time of modification is the run's heartbeat."""
        return self.state / "runs"

    @property
    def suspects(self) -> Path:
        """One file per case during which a process died."""
        return self.state / "suspects"

    @property
    def records(self) -> Path:
        """One record per case, in 256 folders."""
        return self.state / "records"

    @property
    def identity(self) -> Path:
        """Which model and settings the results are of."""
        return self.state / "identity.json"

    @property
    def runtime(self) -> Path:
        """The runtime and precision that the first process settled on."""
        return self.state / "runtime.json"

    @property
    def labels(self) -> Path:
        """Names and values of the labels in the results."""
        return self.state / "labels.json"

    @property
    def lock(self) -> Path:
        """The file that is locked while the claim of a dead run is removed."""
        return self.state / "lock"

    @property
    def tables_lock(self) -> Path:
        """The file that is locked while the tables are derived."""
        return self.state / "tables-lock"

    def record(self, case: str) -> Path:
        """Return the file of a case's record."""
        key = case_key(case)
        return self.records / key[:2] / f"{key}.json"

    def claim(self, case: str) -> Path:
        """Return the file that exists while a run works on a case."""
        key = case_key(case)
        return self.state / "claims" / key[:2] / key

    def suspect(self, case: str) -> Path:
        """Return the file that counts the deaths during a case."""
        return self.suspects / f"{case_key(case)}.json"


def case_key(case: str) -> str:
    """Return a file name for a case: a hash, because names may be long and hold slashes."""
    return hashlib.sha256(os.fsencode(case)).hexdigest()[:KEY_LETTERS]
