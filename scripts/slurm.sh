#!/usr/bin/env bash
#SBATCH --job-name=saetrain
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --signal=TERM@120
#SBATCH --requeue
#
# Train over several hosts under SLURM: one agent of torchrun on each, which starts a process for each GPU.
#
#   sbatch --nodes 4 scripts/slurm.sh bert-base-uncased wikitext --layers 6 --k 32 --run_name big
#
# The words are saetrain's. --resume goes on where a job that was preempted left off, and does nothing at the first start.
#
#   N_GPUS            processes of a host (SLURM's GPUs of a node; 1 without)
#   MASTER_PORT       port on the first host at which the processes meet (29500)
set -euo pipefail

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
processes=${N_GPUS:-${SLURM_GPUS_ON_NODE:-1}}
cores=${SLURM_CPUS_PER_TASK:-1}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > processes ? cores / processes : 1))}

# srun does not take over the cores of sbatch by itself; torchrun passes SIGTERM on, and kills what has not saved in time.
srun --cpus-per-task="$cores" python -m torch.distributed.run \
  --nnodes "$SLURM_NNODES" --nproc_per_node "$processes" --shutdown_timeout 110 \
  --rdzv_id "$SLURM_JOB_ID" --rdzv_backend c10d --rdzv_endpoint "$first:${MASTER_PORT:-29500}" \
  --max_restarts 2 -m saetrain "$@" --resume
