#!/usr/bin/env bash
# The GPU suite in one call: correctness on the device, ceilings, steps and whole runs beside plain PyTorch and sparsify.
#
#   benchmarks/gpu.sh [--out FILE] [--quick] [--minutes M]
#
# Needs torch, transformers, triton, numpy and safetensors alone, and takes less than 9 minutes. Without a GPU the
# kernels run in Triton's interpreter on small sizes, what would be timed is listed, and it ends with 0. SPARSIFY names
# the folder or the wheel of eai-sparsify, whose own kernels are then timed too; PYTHON another interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH="$PWD:$PWD/src${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" -m benchmarks.gpu "$@"
