"""The kernels of convolution and linear attention on a real device: the checks of the interpreter, at real sizes."""

import pytest
import torch

from tests.helpers.conv_linear_kernels import (
    CONV_CASES,
    LINEAR_CASES,
    check_conv,
    check_decode,
    check_linear,
    check_repeatable,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

LARGE_CONV = {
    "long": ((2, 1000, 8, 2, 64, 3), {}),
    "wide heads": ((1, 129, 4, 4, 128, 4), {"starts": "packed"}),
}
LARGE_LINEAR = {
    "long": ((2, 1000, 8, 2, 64, 64), {"memory": True, "normalise": True}),
    "wide heads": ((1, 257, 2, 1, 128, 128), {"normalise": True, "starts": "packed"}),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [*CONV_CASES, *LARGE_CONV])
def test_convolution(name, dtype):
    check_conv(*(CONV_CASES | LARGE_CONV)[name], "cuda", dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [*LINEAR_CASES, *LARGE_LINEAR])
def test_linear(name, dtype):
    check_linear(*(LINEAR_CASES | LARGE_LINEAR)[name], "cuda", dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalise", [False, True])
def test_decode(dtype, normalise):
    check_decode("cuda", dtype, normalise)


def test_repeatable():
    check_repeatable("cuda", 1000)
