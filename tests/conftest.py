"""One thread a process: tests run side by side on small machines, and sums then have one order."""

import os
import random

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch

torch.set_num_threads(1)

# Read when triton is first imported: without a GPU its kernels run in the interpreter, in the same process as all else.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random numbers in whatever order, and in whichever process, tests run."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
