"""Progress on stderr: steps done, rate, and the time that is left."""

import sys
import time


class Progress:
    """Counts the steps of all runs together. On a terminal it rewrites one line; elsewhere it prints one a minute."""

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0
        self._start = time.monotonic()
        self._shown = -1e9
        self._terminal = sys.stderr.isatty()

    def add(self, steps: int, label: str = "") -> None:
        """Adds `steps` to the count, and shows the line when half a second (in a log: a minute) has passed."""
        self.done += steps
        now = time.monotonic()
        if now - self._shown >= (0.5 if self._terminal else 60.0) or self.done >= self.total:
            self._shown = now
            self._write(f"{self.line(now - self._start)}  {label}", "\r\x1b[K", "")

    def line(self, seconds: float) -> str:
        """The progress line after `seconds` of work: steps done, rate, time left.

        >>> Progress(100).line(1.0)
        '0/100 steps'
        """
        text = f"{self.done:,}/{self.total:,} steps"
        if not self.done:
            return text
        rate = self.done / max(seconds, 1e-9)
        left = round((self.total - self.done) / rate)
        return f"{text}  {rate:.1f} steps/s  {left // 60}:{left % 60:02d} left"

    def say(self, message: str) -> None:
        """Prints a message on a line of its own."""
        self._write(message, "\r\x1b[K", "\n")

    def close(self) -> None:
        """Ends the line that was rewritten, so that later output begins on a new one."""
        if self._terminal and self.done:
            print(file=sys.stderr)

    def _write(self, text: str, before: str, after: str) -> None:
        before, after = (before, after) if self._terminal else ("", "\n")
        print(f"{before}{text.rstrip()}{after}", end="", file=sys.stderr, flush=True)
