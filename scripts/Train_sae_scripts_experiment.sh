#!/usr/bin/env bash
# Study dead latents: train and assess SAEs for each point of a small grid, and print one table of all runs.
#
#   MODEL=bert-base-uncased DATASET=wikitext LRS="0.001 auto" KS="32 192" scripts/Train_sae_scripts_experiment.sh
#
# A run trains the SAEs of all values of LRS, KS and NUM_LATENTS_LIST (docs/sweeps.md), and there is one run per value of
# AUXK_ALPHAS. With --loss_fn ce or kl, --finetune and sgd, there is one run per point of the grid. Each run has a folder
# in SAVE_DIR/RUN_NAME. The table is written to comparison.json in SAVE_DIR/RUN_NAME. These lists define the grid:
#
#   AUXK_ALPHAS       weights of the AuxK loss, which revives dead latents (default: "0 0.03125")
#   LRS               learning rates (default: LR, else "0.001 auto"; "0.001 0.004" with sgd, ce, kl and --finetune)
#   KS                active latents per token (default: K only)
#   NUM_LATENTS_LIST  numbers of latents (default: NUM_LATENTS or EXPANSION_FACTOR only)
set -euo pipefail
rates_by_grid=true
# shellcheck source=scripts/settings.sh
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"

RUN_NAME=${RUN_NAME:-$(basename "$MODEL")_dead_latents}
study=$SAVE_DIR/$RUN_NAME
export WANDB_RUN_GROUP=${WANDB_RUN_GROUP:-$RUN_NAME}

# vary FLAG VALUES: combine each point of the grid with every value.
vary() {
  local -a values before=("${grid[@]}")
  local point value
  read -ra values <<< "$2"
  if [[ -z $2 ]]; then return; fi
  grid=()
  for point in "${before[@]}"; do
    for value in "${values[@]}"; do grid+=("$point $1 $value"); done
  done
}

grid=("")
vary --auxk_alpha "${AUXK_ALPHAS:-0 0.03125}"
# --lr auto supports only Adam, reconstruction losses and random initial weights. Other studies use fixed rates.
if [[ -n ${no_rule:-} ]]; then rates="0.001 0.004"; else rates="0.001 auto"; fi
rates=${LRS:-${LR:-$rates}}
saes=()
if [[ -n ${no_rule:-} ]]; then
  # With --loss_fn ce or kl and with --finetune, SAEs can't share a run.
  vary --lr "$rates"
  vary --k "${KS:-}"
  vary --num_latents "${NUM_LATENTS_LIST:-}"
else
  for axis in "--lr $rates" ${KS:+"--k $KS"} ${NUM_LATENTS_LIST:+"--num_latents $NUM_LATENTS_LIST"}; do
    read -ra values <<< "$axis"
    saes+=("${values[@]}")
  done
fi

runs=()
for point in "${grid[@]}"; do
  read -ra flags <<< "$point"
  name=${point# --}
  name=${name// --/_}
  name=${name// /}
  runs+=("$study/$name")
  echo "run ${#runs[@]} of ${#grid[@]}:$point" >&2
  saetrain "${settings[@]}" "${flags[@]}" "${saes[@]}" --save_dir "$study" --run_name "$name" "$@"
done
compare_to "$study/comparison.json" "${runs[@]}"
