"""The Triton kernels of evict_merge."""
