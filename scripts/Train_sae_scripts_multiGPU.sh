#!/usr/bin/env bash
# Train SAEs with one process per GPU (without a GPU: several processes on the CPU), assess them, and print a summary.
#
#   MODEL=bert-base-uncased DATASET=wikitext N_GPUS=4 BATCH_SIZE=16 scripts/Train_sae_scripts_multiGPU.sh
#
# The run is written to SAVE_DIR/RUN_NAME, and its summary to summary.json in that folder. BATCH_SIZE and GRAD_ACC_STEPS
# define the global batch, which the processes share. The number of processes changes the result only by rounding.
#
#   N_GPUS            number of processes, one per GPU (default: all GPUs; 0 uses the CPU)
#   PROCESSES         number of processes without a GPU (default: 2)
set -euo pipefail
# shellcheck source=scripts/settings.sh
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"

RUN_NAME=${RUN_NAME:-$(basename "$MODEL")_multi}
run=$SAVE_DIR/$RUN_NAME
reserve batch_size BATCH_SIZE "$@"
reserve grad_acc_steps GRAD_ACC_STEPS "$@"
count=$(processes)

train_by "$count" --save_dir "$SAVE_DIR" --run_name "$RUN_NAME" "$@"
compare_to "$run/summary.json" "$run"
