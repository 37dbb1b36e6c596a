"""What the kernels share: loading a tile, the rows of the relative table, the skew, the mask."""
