"""Predicts what the CUDA kernels should take on a GPU, from launch plans and machine code; docs/gpu-model.md is its page."""
