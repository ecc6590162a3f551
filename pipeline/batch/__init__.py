"""Many cases: what is to be done, what was done, what failed and why.

Modules:
    runner      segments cases one after the other, with reading ahead and writing behind
    case_row    one row of `cases.csv`
    outputs     the names of the files that a batch writes
    provenance  `run.json`: which model made the results
    prefetch    reading ahead and writing behind
"""

from pipeline.batch.case_row import CaseRow
from pipeline.batch.outputs import output_path, uncertainty_path
from pipeline.batch.runner import Progress, run_bundle, segment_cases

__all__ = [
    "CaseRow",
    "Progress",
    "output_path",
    "run_bundle",
    "segment_cases",
    "uncertainty_path",
]
