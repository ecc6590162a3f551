"""Segment a study by workers of Dask that dask-jobqueue submits to Slurm as they are needed.

Needs volseg[dask] and dask-jobqueue: `python scripts/cluster/jobqueue.py study/ out [OPTION...]`
"""

from __future__ import annotations

import subprocess
import sys

from dask_jobqueue import SLURMCluster


def main() -> int:
    """Start workers, have volseg use them, and return its exit status."""
    study, out, *options = sys.argv[1:]
    # one process per job, so that a case that kills its worker costs one job; volseg computes with
    # as many threads as the worker has cores, one case at a time
    with SLURMCluster(cores=4, processes=1, memory="8GiB", walltime="04:00:00") as cluster:
        cluster.adapt(maximum_jobs=16)
        command = ["volseg", "segment", study, "--output", out, "--dask", cluster.scheduler_address]
        return subprocess.run([*command, *options], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
