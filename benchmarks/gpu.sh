#!/usr/bin/env bash
# Checks the Triton kernels on a GPU, and times training steps and end-to-end passes next to plain PyTorch and sparsify.
# Takes less than 9 minutes. Needs only torch, transformers, triton, numpy and safetensors.
#
#   benchmarks/gpu.sh [--out FILE] [--quick] [--minutes M]
#
# Without a GPU, the kernels run on small sizes in Triton's interpreter, the planned measurements are listed, and the
# exit code is 0. PYTHON is the Python interpreter. If SPARSIFY is the path of the folder `sparsify` or of the wheel of
# eai-sparsify, its own kernels are timed too.
set -euo pipefail
root=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd)
export PYTHONPATH="$root:$root/src${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-python3}
if [ -z "${PYTHON:-}" ] && [ -x "$root/.venv/bin/python" ]; then python=$root/.venv/bin/python; fi
"$python" -c '
import importlib.util, sys
missing = [name for name in ("torch", "transformers", "triton", "numpy", "safetensors") if not importlib.util.find_spec(name)]
if missing:
    sys.exit(f"benchmarks/gpu.sh: {sys.executable} lacks {chr(32).join(missing)}; set PYTHON to another interpreter")
'
exec "$python" -m benchmarks.gpu "$@"
