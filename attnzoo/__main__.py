"""The entry point of the command `attnzoo` and of `python -m attnzoo`: says what Ctrl-C does, then imports the rest."""

import sys

from attnzoo import interrupts


def entry() -> int:
    """Runs the command (`attnzoo.cli.entry`) and returns its exit status, 130 after Ctrl-C."""
    is_asked = interrupts.end_at_once()
    from attnzoo.cli import entry as run

    try:
        if is_asked:
            interrupts.end_in_order()
        return run()
    except KeyboardInterrupt:
        interrupts.tell()
        return interrupts.INTERRUPTED
    finally:
        if is_asked:
            interrupts.end_at_once()


if __name__ == "__main__":
    sys.exit(entry())
