"""The Triton kernels of relative attention."""
