"""The progress bar: a line that is rewritten on a terminal, lines of their own in a log."""

import sys
from typing import Any

from tqdm import tqdm

LOG_SECONDS = 30.0
"""Seconds between the lines of a log."""


class Bar(tqdm):
    """tqdm's bar, with its options; where stderr is no terminal, a line every half minute, in a log that people read
    from top to bottom."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._log = not sys.stderr.isatty()
        if self._log:
            options |= {"mininterval": LOG_SECONDS, "maxinterval": LOG_SECONDS, "ascii": True}
        super().__init__(*arguments, **options)

    @staticmethod
    def status_printer(file: Any) -> Any:
        """What shows a state of the bar."""
        if file.isatty():
            return tqdm.status_printer(file)
        return lambda text: print(text.strip(), file=file, flush=True) if text.strip() else None

    def clear(self, nolock: bool = False) -> None:
        """Wipes the line before something else is written; a log has nothing to wipe."""
        if not self._log:
            super().clear(nolock)

    def refresh(self, nolock: bool = False, lock_args: Any = None) -> None:
        """Shows the state; in a log not once more after something else was written."""
        if not (self._log and nolock):
            super().refresh(nolock, lock_args)
