"""The largest memory of the process during each of several cases that overlap."""

from __future__ import annotations

import threading
from collections.abc import Hashable

from pipeline.inference import peak_bytes, reset_peak


class PeakMemory:
    """Keeps the peak of each case that is under way.

    The kernel keeps one peak per process, which can be reset. It is read and reset whenever a case
    begins or ends, and what was read counts for all cases that were under way.
    """

    def __init__(self) -> None:
        self._peaks: dict[Hashable, int] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[PeakMemory], tuple[()]]:
        """A process that is spawned counts its own memory; a lock cannot be sent to it."""
        return type(self), ()

    def begin(self, case: Hashable) -> None:
        """Measure the peak memory of a case from now on."""
        with self._lock:
            self._update()
            self._peaks[case] = 0

    def end(self, case: Hashable) -> int:
        """Return the peak of a case, bytes, which ends."""
        with self._lock:
            self._update()
            return self._peaks.pop(case, 0)

    def _update(self) -> None:
        peak = peak_bytes()
        reset_peak()
        for case, known in self._peaks.items():
            self._peaks[case] = max(known, peak)
