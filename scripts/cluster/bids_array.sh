#!/bin/bash
# Segments a BIDS dataset by a job array of Slurm, one participant per task, in a container:
#   sbatch --array=1-"$(ls -d DATA/sub-*/ | wc -l)" scripts/cluster/bids_array.sh DATA OUT [OPTION...]
# DATA, OUT and volseg.sif must have the same path on all nodes; OUT exists.
#SBATCH --job-name=volseg-bids
#SBATCH --cpus-per-task=4
#SBATCH --mem=8G
#SBATCH --requeue
# a second attempt of a task appends to the log of the first
#SBATCH --open-mode=append
#SBATCH --output=volseg-%A_%a.log
set -euo pipefail
subjects=("$1"/sub-*/)
subject=$(basename "${subjects[SLURM_ARRAY_TASK_ID - 1]}")
# exec: the signal that Slurm sends before it takes a node away reaches volseg, not a shell
exec apptainer run --cleanenv --env SLURM_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK" \
  --bind "$1:/data:ro,$2:/out" volseg.sif bids /data /out participant \
  --participant-label "$subject" "${@:3}"
