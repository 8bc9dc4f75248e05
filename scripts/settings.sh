#!/usr/bin/env bash
# Environment variables set the options of all four pipelines. Unset variables keep saetrain's default.
#
#   MODEL             hub id or local folder of a transformer (default: bert-base-uncased)
#   DATASET           hub id, local folder or file (default: wikitext)
#   LAYERS            layers to train SAEs on, such as "3 6 9"
#   MAX_TOKENS        activations to train on
#   K                 active latents per token
#   EXPANSION_FACTOR  number of latents as a multiple of the activation width
#   NUM_LATENTS       number of latents, instead of EXPANSION_FACTOR
#   BATCH_SIZE        sequences per micro-batch, over all processes (default: 4)
#   GRAD_ACC_STEPS    micro-batches per optimizer step, over all processes (default: 1)
#   CTX_LEN           tokens per sequence
#   LR                peak learning rate (default: auto)
#   LOG_TO_WANDB      true also logs to Weights & Biases
#   SAVE_DIR          folder of all runs (default: ./output)
#   RUN_NAME          folder of this run in SAVE_DIR (default: made from the names of the model and the script)
#   PYTHON            Python interpreter with saetrain (default: python)
#
# Arguments of the script are passed to saetrain: flags (see saetrain --help) or more data sets.

SAVE_DIR=${SAVE_DIR:-./output}
PYTHON=${PYTHON:-python}

scripts=$(dirname "${BASH_SOURCE[0]}")
planning=
from_file=

saetrain() {
  "$PYTHON" -m saetrain "$@"
}

# refuse MESSAGE: print the message and exit with 2, as saetrain does for an error of the user.
refuse() {
  echo "${0##*/}: error: $1" >&2
  exit 2
}

# header FILE: print the comment at the top of the file.
header() {
  awk '/^#!/ {next} !/^#/ {exit} {sub(/^# ?/, ""); print}' "$1"
}

# setting FLAG VALUE ...: add the flag if a value is set.
setting() {
  if [[ -n ${2:-} ]]; then settings+=("$@"); fi
}

# whole_number VARIABLE: exit with an error unless the variable is a whole number from 1.
whole_number() {
  if ! [[ ${!1} =~ ^[1-9][0-9]*$ ]]; then refuse "$1=${!1}: must be a whole number, at least 1"; fi
}

# reserve FLAG VARIABLE WORD ...: exit with an error if a word is the flag. The script reads its variable instead.
reserve() {
  local flag=$1 variable=$2 word name
  shift 2
  for word in "$@"; do
    name=${word%%=*}
    if [[ ${name//-/_} == "__$flag" ]]; then refuse "--$flag: set the variable $variable instead"; fi
  done
}

# processes: print N_GPUS (default: the number of GPUs that PyTorch finds), or PROCESSES if there is no GPU.
processes() {
  local N_GPUS=${N_GPUS:-} PROCESSES=${PROCESSES:-2}
  # This function runs inside $(processes), where bash drops -e. So exit explicitly.
  if [[ -z $N_GPUS ]]; then N_GPUS=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())') || exit; fi
  if [[ $N_GPUS == 0 ]]; then
    whole_number PROCESSES
    echo "$PROCESSES"
  else
    whole_number N_GPUS
    echo "$N_GPUS"
  fi
}

# need VARIABLE ...: with --config, require the variables, because a default could contradict the file.
need() {
  local variable
  for variable in "$@"; do
    if [[ -n $from_file && -z ${!variable:-} ]]; then refuse "--config: also set the variable $variable"; fi
  done
}

# share PROCESSES: print each process's flags for the global batch (batch_size x grad_acc_steps x processes).
share() {
  need BATCH_SIZE GRAD_ACC_STEPS
  local BATCH_SIZE=${BATCH_SIZE:-4} GRAD_ACC_STEPS=${GRAD_ACC_STEPS:-1}
  whole_number BATCH_SIZE
  whole_number GRAD_ACC_STEPS
  local common=$GRAD_ACC_STEPS rest=$1 next
  # Greatest common divisor: divide the micro-batches first, so that micro-batches stay as large as possible.
  while ((rest)); do next=$((common % rest)) common=$rest rest=$next; done
  if ((BATCH_SIZE * common % $1)); then
    refuse "BATCH_SIZE=$BATCH_SIZE times GRAD_ACC_STEPS=$GRAD_ACC_STEPS can't be divided evenly among $1 processes"
  fi
  echo --batch_size $((BATCH_SIZE * common / $1)) --grad_acc_steps $((GRAD_ACC_STEPS / common))
}

# train_by PROCESSES WORD ...: train in several processes with the same global batch.
train_by() {
  local count=$1 text cores
  local -a part
  shift
  text=$(share "$count")
  read -ra part <<< "$text"
  # By default, torchrun gives each of several processes one thread.
  if [[ $count != 1 && -z ${OMP_NUM_THREADS:-} ]]; then
    cores=$(nproc 2> /dev/null || getconf _NPROCESSORS_ONLN)
    export OMP_NUM_THREADS=$((cores > count ? cores / count : 1))
  fi
  "$PYTHON" "$scripts/torchrun.py" --standalone --nproc_per_node "$count" -m saetrain \
    "${settings[@]}" "${part[@]}" "$@"
}

# compare_to FILE RUN ...: print one table of the runs and write it to FILE, except in a dry run.
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
  # A flag and its value are either one word or two.
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
