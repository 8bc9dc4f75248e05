"""The SAE's step on a GPU: Triton's kernels beside plain PyTorch and sparsify's step, and under the ceilings.

``benchmarks/gpu.sh`` calls it. It needs torch, transformers, triton, numpy and safetensors alone, and this repository.
"""
