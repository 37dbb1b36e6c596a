"""One thread a process: tests run side by side on small machines, and sums then have one order."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

torch.set_num_threads(1)
