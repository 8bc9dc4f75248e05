#!/usr/bin/env bash
# Train SAEs, assess them on held-out text, and print a summary.
#
#   MODEL=bert-base-uncased DATASET=wikitext LAYERS="6 8" scripts/Train_sae_script.sh --save_every 500
#
# The run lies in SAVE_DIR/RUN_NAME, with its summary in summary.json.
#
#   EVAL_DATASET      another data set to score the SAEs on as well
set -euo pipefail
# shellcheck source=scripts/settings.sh
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"

RUN_NAME=${RUN_NAME:-$(basename "$MODEL")_sae}
run=$SAVE_DIR/$RUN_NAME

saetrain "${settings[@]}" --save_dir "$SAVE_DIR" --run_name "$RUN_NAME" "$@"
if [[ -n ${EVAL_DATASET:-} && -z $planning ]]; then saetrain evaluate "$run" --dataset "$EVAL_DATASET"; fi
compare_to "$run/summary.json" "$run"
