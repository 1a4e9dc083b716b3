#!/usr/bin/env bash
# Train under SLURM, and go on by itself after a preemption or the time limit:
#
#   sbatch scripts/slurm.sh --config configs/digits.yaml --config configs/overlays/ddp.yaml
#
# The next line is the one to change. For 2 nodes with 8 GPUs each: --nodes=2 --ntasks-per-node=8 --gpus-per-node=8
#SBATCH --nodes=1 --ntasks-per-node=1 --cpus-per-task=4
#SBATCH --job-name=fit
#SBATCH --time=24:00:00
#SBATCH --requeue
# USR1 90 seconds before the end: the step ends, is saved, and the job goes back into the queue.
#SBATCH --signal=USR1@90
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

# Every process of the job writes to the folder of the run that the first start made.
set -- "$@" --ckpt_path last \
    --trainer.num_nodes "${SLURM_NNODES:?is not set: start it with sbatch}" --trainer.devices "${SLURM_NTASKS_PER_NODE:-1}"

# One process per device. srun hands the signal on to each of them; PYTHON is another than that of the environment.
exec srun "${PYTHON:-python}" -m project fit "$@"
