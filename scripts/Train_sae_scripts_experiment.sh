#!/usr/bin/env bash
# Study dead latents: train and assess an SAE for each point of a small grid, and print one table of all.
#
#   MODEL=bert-base-uncased DATASET=wikitext LRS="0.001 auto" KS="32 192" scripts/Train_sae_scripts_experiment.sh
#
# The runs lie in SAVE_DIR/RUN_NAME, one folder each, with the table in comparison.json. Lists span the grid:
#
#   AUXK_ALPHAS       weights of the loss that revives dead latents ("0 0.03125")
#   LRS               learning rates (LR, else "0.001 auto"; "0.001 0.004" with sgd, ce, kl and --finetune)
#   KS                active latents per token (K alone)
#   NUM_LATENTS_LIST  numbers of latents (NUM_LATENTS or EXPANSION_FACTOR alone)
set -euo pipefail
rates_by_grid=true
# shellcheck source=scripts/settings.sh
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"

RUN_NAME=${RUN_NAME:-$(basename "$MODEL")_dead_latents}
study=$SAVE_DIR/$RUN_NAME
export WANDB_RUN_GROUP=${WANDB_RUN_GROUP:-$RUN_NAME}

# vary FLAG VALUES: each point of the grid so far, once with every value.
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
# The rule is for runs of one kind; the others are studied at fixed rates.
if [[ -n ${no_rule:-} ]]; then rates="0.001 0.004"; else rates="0.001 auto"; fi
vary --lr "${LRS:-${LR:-$rates}}"
vary --k "${KS:-}"
vary --num_latents "${NUM_LATENTS_LIST:-}"

runs=()
for point in "${grid[@]}"; do
  read -ra flags <<< "$point"
  name=${point# --}
  name=${name// --/_}
  name=${name// /}
  runs+=("$study/$name")
  echo "run ${#runs[@]} of ${#grid[@]}:$point" >&2
  saetrain "${settings[@]}" "${flags[@]}" --save_dir "$study" --run_name "$name" "$@"
done
compare_to "$study/comparison.json" "${runs[@]}"
