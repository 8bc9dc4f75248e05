#!/usr/bin/env bash
#SBATCH --job-name=saetrain
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --signal=TERM@120
#SBATCH --requeue
#
# Train on several hosts under SLURM. One torchrun agent per host starts one process per GPU.
#
#   sbatch --nodes 4 scripts/slurm.sh bert-base-uncased wikitext --layers 6 --k 32 --run_name big
#
# The arguments are passed to saetrain. The script adds --resume, so that a preempted job continues from its last
# checkpoint. The first start has no checkpoint and begins from scratch.
#
#   N_GPUS            processes per host (default: the GPUs per node from SLURM, else 1)
#   MASTER_PORT       port of the rendezvous on the first host (default: 29500)
set -euo pipefail

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
processes=${N_GPUS:-${SLURM_GPUS_ON_NODE:-1}}
cores=${SLURM_CPUS_PER_TASK:-1}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > processes ? cores / processes : 1))}

# srun does not inherit --cpus-per-task from sbatch. torchrun forwards SIGTERM, and kills processes that have not ended
# within --shutdown_timeout seconds.
srun --cpus-per-task="$cores" python -m torch.distributed.run \
  --nnodes "$SLURM_NNODES" --nproc_per_node "$processes" --shutdown_timeout 110 \
  --rdzv_id "$SLURM_JOB_ID" --rdzv_backend c10d --rdzv_endpoint "$first:${MASTER_PORT:-29500}" \
  --max_restarts 2 -m saetrain "$@" --resume
