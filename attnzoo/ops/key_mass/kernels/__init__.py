"""The Triton kernels of key_mass."""
