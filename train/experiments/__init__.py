"""Experiments that repeat published results, one publication a file; `scripts/reproduce.py` runs them."""
