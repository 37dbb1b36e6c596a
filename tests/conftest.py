"""One thread a process: tests run side by side on small machines, and sums then have one order."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

torch.set_num_threads(1)

# Read when triton is first imported: without a GPU its kernels run in the interpreter, in the same process as all else.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
