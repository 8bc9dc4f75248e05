#!/usr/bin/env bash
# Settings of all four pipelines are environment variables; one that is not set leaves saetrain's own default.
#
#   MODEL             hub id or local folder of a transformer (bert-base-uncased)
#   DATASET           hub id, local folder or file (wikitext)
#   LAYERS            layers to train an SAE on, such as "3 6 9"
#   MAX_TOKENS        activations to train on
#   K                 active latents per token
#   EXPANSION_FACTOR  latents as a multiple of the width
#   NUM_LATENTS       latents as a number, in place of EXPANSION_FACTOR
#   BATCH_SIZE        sequences of a micro-step, over all processes (4)
#   GRAD_ACC_STEPS    micro-steps of an optimizer step, over all processes (1)
#   CTX_LEN           tokens of a sequence
#   LR                peak learning rate (auto)
#   LOG_TO_WANDB      true logs to Weights & Biases as well
#   SAVE_DIR          folder of the runs (./output)
#   RUN_NAME          folder in it (made from the names of model and script)
#   PYTHON            interpreter that has saetrain (python)
#
# Words behind the script's name go to saetrain as they are: its flags (saetrain --help), or further data sets.

SAVE_DIR=${SAVE_DIR:-./output}
PYTHON=${PYTHON:-python}

scripts=$(dirname "${BASH_SOURCE[0]}")
planning=
from_file=

saetrain() {
  "$PYTHON" -m saetrain "$@"
}

# refuse MESSAGE: end as saetrain does where the user can mend it.
refuse() {
  echo "${0##*/}: error: $1" >&2
  exit 2
}

# header FILE: print the comment at its head.
header() {
  awk '/^#!/ {next} !/^#/ {exit} {sub(/^# ?/, ""); print}' "$1"
}

# setting FLAG VALUE ...: pass the flag on where there is a value.
setting() {
  if [[ -n ${2:-} ]]; then settings+=("$@"); fi
}

# whole_number VARIABLE: refuse a value that the shell can't reckon with.
whole_number() {
  if ! [[ ${!1} =~ ^[1-9][0-9]*$ ]]; then refuse "$1=${!1}: must be a whole number from 1"; fi
}

# reserve FLAG VARIABLE WORD ...: refuse a flag that the script must know itself, and so takes as a variable.
reserve() {
  local flag=$1 variable=$2 word name
  shift 2
  for word in "$@"; do
    name=${word%%=*}
    if [[ ${name//-/_} == "__$flag" ]]; then refuse "--$flag: set the variable $variable in its place"; fi
  done
}

# processes: N_GPUS, which is otherwise the number of GPUs that PyTorch sees; without a GPU, PROCESSES.
processes() {
  local N_GPUS=${N_GPUS:-} PROCESSES=${PROCESSES:-2}
  # Within $(processes), where this runs, bash does not keep -e.
  if [[ -z $N_GPUS ]]; then N_GPUS=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())') || exit; fi
  if [[ $N_GPUS == 0 ]]; then
    whole_number PROCESSES
    echo "$PROCESSES"
  else
    whole_number N_GPUS
    echo "$N_GPUS"
  fi
}

# need VARIABLE ...: refuse to guess what a file of settings may say otherwise.
need() {
  local variable
  for variable in "$@"; do
    if [[ -n $from_file && -z ${!variable:-} ]]; then refuse "--config: set the variable $variable beside it"; fi
  done
}

# share PROCESSES: each one's part of the global batch, which is batch_size x grad_acc_steps x processes.
share() {
  need BATCH_SIZE GRAD_ACC_STEPS
  local BATCH_SIZE=${BATCH_SIZE:-4} GRAD_ACC_STEPS=${GRAD_ACC_STEPS:-1}
  whole_number BATCH_SIZE
  whole_number GRAD_ACC_STEPS
  local common=$GRAD_ACC_STEPS rest=$1 next
  # Euclid: micro-steps are dealt out as far as they go, so that micro-batches stay as large as they can.
  while ((rest)); do next=$((common % rest)) common=$rest rest=$next; done
  if ((BATCH_SIZE * common % $1)); then
    refuse "BATCH_SIZE=$BATCH_SIZE times GRAD_ACC_STEPS=$GRAD_ACC_STEPS can't be dealt out to $1 processes evenly"
  fi
  echo --batch_size $((BATCH_SIZE * common / $1)) --grad_acc_steps $((GRAD_ACC_STEPS / common))
}

# train_by PROCESSES WORD ...: train in several processes over the same global batch.
train_by() {
  local count=$1 text cores
  local -a part
  shift
  text=$(share "$count")
  read -ra part <<< "$text"
  # Left alone, torchrun gives each of several processes a single thread.
  if [[ $count != 1 && -z ${OMP_NUM_THREADS:-} ]]; then
    cores=$(nproc 2> /dev/null || getconf _NPROCESSORS_ONLN)
    export OMP_NUM_THREADS=$((cores > count ? cores / count : 1))
  fi
  "$PYTHON" "$scripts/torchrun.py" --standalone --nproc_per_node "$count" -m saetrain \
    "${settings[@]}" "${part[@]}" "$@"
}

# compare_to FILE RUN ...: print one table of the runs and write it, unless nothing was run.
compare_to() {
  local file=$1
  shift
  if [[ -z $planning ]]; then saetrain compare "$@" --out "$file"; fi
}

before=
for word in "$@"; do
  case $word in
    -h | --help)
      header "$0"
      echo
      header "${BASH_SOURCE[0]}"
      exit 0
      ;;
    --dry[-_]run | --dry[-_]run=true) planning=true ;;
    --config | --config=*) from_file=true own_rate= ;;
    --lr | --lr=*) own_rate= ;;
    --finetune | --finetune=*) no_rule=true ;;
  esac
  # A flag and its value come as one word or as two.
  case $before=$word in
    *--optimizer=sgd | *--loss[-_]fn=ce | *--loss[-_]fn=kl) no_rule=true ;;
  esac
  before=$word
done
if [[ -n ${no_rule:-} ]]; then own_rate=; fi

reserve save_dir SAVE_DIR "$@"
reserve run_name RUN_NAME "$@"
need MODEL DATASET

MODEL=${MODEL:-bert-base-uncased}
DATASET=${DATASET:-wikitext}
settings=("$MODEL" "$DATASET")
read -ra layers <<< "${LAYERS:-}"
if [[ -n ${LAYERS:-} ]]; then settings+=(--layers "${layers[@]}"); fi
setting --max_tokens "${MAX_TOKENS:-}"
setting --k "${K:-}"
setting --expansion_factor "${EXPANSION_FACTOR:-}"
setting --num_latents "${NUM_LATENTS:-}"
setting --batch_size "${BATCH_SIZE:-}"
setting --grad_acc_steps "${GRAD_ACC_STEPS:-}"
setting --ctx_len "${CTX_LEN:-}"
if [[ -z ${rates_by_grid:-} ]]; then setting --lr "${LR:-${own_rate-auto}}"; fi
setting --log_to_wandb "${LOG_TO_WANDB:-}"
if [[ ${N_GPUS:-} == 0 ]]; then setting --device cpu; fi
