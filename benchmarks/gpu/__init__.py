"""The SAE's step on a GPU: Triton kernels compared with plain PyTorch, sparsify's step and the device's peak rates.

``benchmarks/gpu.sh`` runs this package. Apart from this repository, it needs only torch, transformers, triton, numpy
and safetensors.
"""
