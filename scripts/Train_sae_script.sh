#!/usr/bin/env bash
# Train SAEs, assess them on held-out text, and print a summary.
#
#   MODEL=bert-base-uncased DATASET=wikitext LAYERS="6 8" scripts/Train_sae_script.sh --save_every 500
#
# The run is written to SAVE_DIR/RUN_NAME, and its summary to summary.json in that folder.
#
#   EVAL_DATASET      another data set on which the SAEs are also scored
set -euo pipefail
# shellcheck source=scripts/settings.sh
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"

RUN_NAME=${RUN_NAME:-$(basename "$MODEL")_sae}
run=$SAVE_DIR/$RUN_NAME

saetrain "${settings[@]}" --save_dir "$SAVE_DIR" --run_name "$RUN_NAME" "$@"
if [[ -n ${EVAL_DATASET:-} && -z $planning ]]; then saetrain evaluate "$run" --dataset "$EVAL_DATASET"; fi
compare_to "$run/summary.json" "$run"
