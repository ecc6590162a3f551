"""Volumes that stand out among the cases of one batch, by median and median absolute deviation.

Logarithms of the volumes are compared, because volumes of ventricles or lesions are skewed, and
because half and double are then equally far from the median. A case is marked where its modified
z-score, 0.6745 (x − median) / MAD, is beyond ±3.5.

References:
    Iglewicz and Hoaglin, How to Detect and Handle Outliers, ASQC Quality Press, 1993
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LIMIT = 3.5  # of the modified z-score, as Iglewicz and Hoaglin recommend
MAD_OF_NORMAL = 0.6745  # MAD of a normal distribution of standard deviation 1
# the MAD of fewer cases is too uncertain: of 4 normal values, one in ten would be marked
MIN_CASES = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class VolumeRange:
    """The usual volumes of one structure in a batch, mm³.

    Attributes:
        cases: number of cases that it follows from; those with a volume of 0 do not count.
        median: of the volumes; nan where there is none.
        low, high: a volume outside is an outlier; 0 and infinity where nothing is marked, because
            there are fewer than `MIN_CASES` cases or half of them have one volume.
    """

    cases: int
    median: float
    low: float
    high: float

    def is_outlier(self, volume: float) -> bool:
        """Return whether a volume stands out; one that is missing (nan) does not."""
        return volume < self.low or volume > self.high


def usual_range(volumes: Sequence[float]) -> VolumeRange:
    """Return the usual volumes of a structure.

    Args:
        volumes: of all cases, mm³; nan where a case has none.
    """
    values = np.asarray(volumes, dtype=np.float64)
    logs = np.log(values[np.isfinite(values) & (values > 0)])
    if not logs.size:
        return VolumeRange(cases=0, median=math.nan, low=0.0, high=math.inf)
    middle = float(np.median(logs))
    deviation = float(np.median(np.abs(logs - middle))) / MAD_OF_NORMAL
    low, high = 0.0, math.inf
    if logs.size >= MIN_CASES and deviation > 0:
        low, high = (math.exp(middle + sign * LIMIT * deviation) for sign in (-1, 1))
    return VolumeRange(cases=int(logs.size), median=math.exp(middle), low=low, high=high)
