"""Cases during which a process died, and when such a case is given up."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.batch.outputs import OutputFolder
from pipeline.io import write_atomically

# Deaths of the process that computed a case, seen by the process that gave it out
MAX_DEATHS = 2
# Deaths of whole runs in which the case was under way: most are somebody's `kill -9` or a power cut
MAX_LOST = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Suspect:
    """A case during which a process died.

    Attributes:
        case: its name.
        deaths: of the process that computed it, while the run went on.
        lost: runs that died as a whole while it was under way.
        last: how the last process died.
    """

    case: str
    deaths: int = 0
    lost: int = 0
    last: str = ""

    @property
    def is_given_up(self) -> bool:
        """Whether the case is not tried again."""
        return self.deaths >= MAX_DEATHS or self.lost >= MAX_LOST

    def reason(self) -> str:
        """Return why the case is not tried again."""
        times = self.deaths if self.deaths >= MAX_DEATHS else self.lost
        return (
            f"the process died {times} times while it computed this case ({self.last}); it is not "
            "tried again: look at the file, or give --overwrite"
        )


def read_suspects(out: OutputFolder) -> dict[str, Suspect]:
    """Return case → suspect, for the cases of an output folder during which a process died."""
    suspects = {}
    for path in out.suspects.glob("*.json"):
        suspect = _read(path)
        if suspect is not None:
            suspects[suspect.case] = suspect
    return suspects


def count_death(out: OutputFolder, case: str, last: str, *, lost: bool) -> Suspect:
    """Count a death during a case, and return the suspect.

    Args:
        out: the output folder.
        case: the name of the case.
        last: how the process died.
        lost: whether the whole run died with it.
    """
    path = out.suspect(case)
    before = _read(path) or Suspect(case=case)
    suspect = Suspect(
        case=case,
        deaths=before.deaths + (0 if lost else 1),
        lost=before.lost + (1 if lost else 0),
        last=last,
    )
    write_atomically(path, json.dumps(asdict(suspect)).encode("ascii"), staging=out.staging)
    return suspect


def clear_suspect(out: OutputFolder, case: str) -> None:
    """Forget the deaths during a case: it was done, or is to be tried again."""
    with suppress(OSError):
        out.suspect(case).unlink()


def _read(path: Path) -> Suspect | None:
    try:
        return Suspect(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError):
        return None
