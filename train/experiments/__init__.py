"""One system of the literature, one file: `run(config)` measures its claims; `scripts/reproduce.py` runs them."""
