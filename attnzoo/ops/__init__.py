"""Operations: pure functions of tensors, one folder each; what they share is in `common`.

In a folder: `__init__` checks the inputs and chooses the implementation; `reference` is what is right, in plain sums;
`torch` runs everywhere; `triton` runs on a GPU, by `kernels` (device code) that `launch` gives grids and arguments;
`memory` and `cost` count bytes and FLOPs.
"""
