"""The top-k step as Triton kernels for NVIDIA GPUs."""
