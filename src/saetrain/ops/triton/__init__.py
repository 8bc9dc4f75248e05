"""The TopK step as Triton kernels for NVIDIA GPUs."""
