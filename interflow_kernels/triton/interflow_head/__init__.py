"""interflow_head in Triton: forward.py and backward.py plan and launch, the files named *_kernels.py run on the GPU."""
