#!/usr/bin/env bash
# Written by uniap-tune VERSION, inputs 0123456789abcdef.
# llama-3.2-1b on 1x8:h100-sxm
#
# Submit it from this folder: sbatch sbatch.sh. Partition, account and time go on its command line; arguments given
# to it are handed on to the training. launch.sh, which must lie beside it, says what can be set in the environment.
#SBATCH --job-name=uniap-tune
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --output=%x-%j.log
set -euo pipefail

MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
export MASTER_ADDR
# Jobs that share a first node one after the other do not share a port.
export MASTER_PORT="${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}"

# One launcher a node; it starts a process for every device, and takes its node's rank from Slurm.
srun --ntasks-per-node=1 --kill-on-bad-exit=1 bash "$SLURM_SUBMIT_DIR/launch.sh" "$@"
