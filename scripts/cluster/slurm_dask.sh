#!/bin/bash
# Segments a study by workers of Dask that Slurm starts:
#   sbatch scripts/cluster/slurm_dask.sh study/ out [OPTION...]
# One task runs the scheduler and volseg, each other task one worker. The inputs, the output folder
# and volseg[dask] must have the same path on all nodes.
#SBATCH --job-name=volseg-dask
#SBATCH --ntasks=4
#SBATCH --cpus-per-task=4
#SBATCH --mem-per-cpu=2G
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=volseg-dask-%j.log
set -euo pipefail
# the network that Dask uses, such as ib0; by default that of the machine's own address
interface=()
[ -z "${DASK_INTERFACE:-}" ] || interface=(--interface "$DASK_INTERFACE")
# in the folder of the job, which all nodes see; a requeued job has another restart count
file=$PWD/volseg-dask-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}.json
trap 'kill $(jobs -p) 2>/dev/null || true; rm -f "$file"' EXIT
dask scheduler --scheduler-file "$file" --port 0 --dashboard-address 127.0.0.1:0 \
  "${interface[@]}" &
# --nthreads: volseg computes with so many threads, one case at a time; --memory-limit 0: Slurm
# limits the memory, Dask would pause or kill a worker earlier
srun --ntasks=$((SLURM_NTASKS - 1)) --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=0 \
  dask worker --scheduler-file "$file" --nthreads "$SLURM_CPUS_PER_TASK" --nworkers 1 \
  --memory-limit 0 --local-directory "${TMPDIR:-/tmp}" --no-dashboard \
  --dashboard-address 127.0.0.1:0 \
  "${interface[@]}" &
until [ -s "$file" ]; do sleep 1; done
address=$(python3 -c 'import json, sys; print(json.load(open(sys.argv[1]))["address"])' "$file")
volseg segment "$1" --output "$2" --dask "$address" "${@:3}"
