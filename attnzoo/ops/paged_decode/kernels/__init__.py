"""The Triton kernels of paged_decode."""
