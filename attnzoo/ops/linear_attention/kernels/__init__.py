"""The device side of linear attention: chunks, their weights, and the kernels over them."""
