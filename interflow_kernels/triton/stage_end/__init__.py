"""stage_end in Triton: forward.py and backward.py plan and launch, the files named *kernels.py run on the GPU, for NCHW and NHWC maps."""
