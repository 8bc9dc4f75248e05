#!/usr/bin/env bash
# The GPU suite in one call: correctness on the device, ceilings, steps and whole runs beside plain PyTorch.
#
#   benchmarks/gpu.sh [--out FILE] [--quick]
#
# Needs torch, transformers, triton, numpy and safetensors, and made for less than 9 minutes on an H100. Without a GPU
# the kernels run in Triton's interpreter on small sizes, what would be timed is listed, and it ends with 0.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" -m benchmarks.gpu "$@"
