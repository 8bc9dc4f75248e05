#!/usr/bin/env bash
# Train the same SAE in one process and in several on the same global batch, and set figures and speed side by side.
#
#   MODEL=bert-base-uncased DATASET=wikitext N_GPUS=4 BATCH_SIZE=16 \
#     scripts/Train_sae_scripts_experiment_single_gpu_comparison.sh
#
# The runs lie in SAVE_DIR/RUN_NAME, in one_process and several_processes, with the table in comparison.json.
#
#   N_GPUS            processes, one per GPU (as many as there are; 0: on the CPU)
#   PROCESSES         processes where there is no GPU (2)
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
  echo "${0##*/}: one process on both sides, for N_GPUS or PROCESSES asks for no more: this shows torchrun alone" >&2
fi

saetrain "${settings[@]}" --save_dir "$study" --run_name one_process "$@"
train_by "$count" --save_dir "$study" --run_name several_processes "$@"
compare_to "$study/comparison.json" "$study/one_process" "$study/several_processes"
