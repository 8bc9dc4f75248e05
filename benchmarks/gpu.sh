#!/usr/bin/env bash
# The GPU suite in one call: correctness on the device, ceilings, steps and whole passes beside plain PyTorch and
# sparsify. Made for less than 9 minutes; needs torch, transformers, triton, numpy and safetensors alone.
#
#   benchmarks/gpu.sh [--out FILE] [--quick] [--minutes M]
#
# Without a GPU the kernels run in Triton's interpreter on small sizes, what would be timed is listed, and it ends with
# 0. PYTHON names the interpreter, SPARSIFY the folder `sparsify` or the wheel of eai-sparsify, whose own kernels are
# then timed too.
set -euo pipefail
root=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd)
export PYTHONPATH="$root:$root/src${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-python3}
if [ -z "${PYTHON:-}" ] && [ -x "$root/.venv/bin/python" ]; then python=$root/.venv/bin/python; fi
"$python" -c '
import importlib.util, sys
missing = [name for name in ("torch", "transformers", "triton", "numpy", "safetensors") if not importlib.util.find_spec(name)]
if missing:
    sys.exit(f"benchmarks/gpu.sh: {sys.executable} lacks {chr(32).join(missing)}; PYTHON names another interpreter")
'
exec "$python" -m benchmarks.gpu "$@"
