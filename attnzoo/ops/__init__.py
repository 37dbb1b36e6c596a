"""Operations: pure functions of tensors, one folder each; what they share is in `common`.

In a folder: `__init__` checks the inputs and chooses the implementation; `reference` defines the result, in plain sums;
`torch` runs everywhere; `triton` runs on a GPU, with device code in `kernels` and their grids and arguments in
`launch`; `memory` and `cost` count bytes and FLOPs.
"""
