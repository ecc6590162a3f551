#!/bin/bash
# Segments a study by a job array of Slurm:
#   sbatch scripts/cluster/slurm_array.sh study/ out [OPTION...]
# The inputs, the output folder and volseg must have the same path on all nodes.
#SBATCH --job-name=volseg
#SBATCH --array=1-4
#SBATCH --cpus-per-task=4
#SBATCH --mem=8G
#SBATCH --requeue
# a second attempt of a task appends to the log of the first
#SBATCH --open-mode=append
#SBATCH --output=volseg-%A_%a.log
set -euo pipefail
# exec: the signal that Slurm sends before it takes a node away reaches volseg, not a shell
exec volseg segment "$1" --output "$2" --shard slurm "${@:3}"
