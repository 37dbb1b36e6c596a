"""How the kernels are launched."""
