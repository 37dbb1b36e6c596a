"""The Triton kernels of relative attention. A file that imports triton is named triton.py, hence the folders."""
