"""The parallel form, backward: no atomics, so that gradients are the same bits in every run."""
