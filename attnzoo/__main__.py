"""`python -m attnzoo`: the command `attnzoo` (see `attnzoo.cli`)."""

import sys

from attnzoo.cli import entry, main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(entry())
