#!/usr/bin/env bash
# Train the same SAEs in one process and in several, with the same global batch, and compare metrics and speed.
#
#   MODEL=bert-base-uncased DATASET=wikitext N_GPUS=4 BATCH_SIZE=16 \
#     scripts/Train_sae_scripts_experiment_single_gpu_comparison.sh
#
# The runs are written to SAVE_DIR/RUN_NAME, in the folders one_process and several_processes. The table is written to
# comparison.json in SAVE_DIR/RUN_NAME.
#
#   N_GPUS            number of processes, one per GPU (default: all GPUs; 0 uses the CPU)
#   PROCESSES         number of processes without a GPU (default: 2)
set -euo pipefail
# shellcheck source=scripts/settings.sh
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"

RUN_NAME=${RUN_NAME:-$(basename "$MODEL")_one_and_several}
study=$SAVE_DIR/$RUN_NAME
export WANDB_RUN_GROUP=${WANDB_RUN_GROUP:-$RUN_NAME}
reserve batch_size BATCH_SIZE "$@"
reserve grad_acc_steps GRAD_ACC_STEPS "$@"
count=$(processes)
share "$count" > /dev/null
if [[ $count == 1 ]]; then
  echo "${0##*/}: both runs use one process; set N_GPUS or PROCESSES to 2 or more" >&2
fi

saetrain "${settings[@]}" --save_dir "$study" --run_name one_process "$@"
train_by "$count" --save_dir "$study" --run_name several_processes "$@"
compare_to "$study/comparison.json" "$study/one_process" "$study/several_processes"
