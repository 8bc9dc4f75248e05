#!/usr/bin/env bash
# Train SAEs in one process per GPU (without a GPU, in several on the CPU), assess them, and print a summary.
#
#   MODEL=bert-base-uncased DATASET=wikitext N_GPUS=4 BATCH_SIZE=16 scripts/Train_sae_scripts_multiGPU.sh
#
# The run lies in SAVE_DIR/RUN_NAME, with its summary in summary.json. BATCH_SIZE and GRAD_ACC_STEPS are those of the
# whole step, which the processes share, so that their number does not change what is computed.
#
#   N_GPUS            processes, one per GPU (as many as there are; 0: on the CPU)
#   PROCESSES         processes where there is no GPU (2)
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
