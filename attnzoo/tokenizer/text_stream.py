"""From tokens to text that may be shown: whole characters only, and nothing that could belong to a stop string."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from attnzoo.models.sampling import TokenLogprobs
from attnzoo.tokenizer.base import Tokenizer


class TextStream:
    """The text of one continuation. `advance` takes its tokens one by one and returns the text that became final;
    `stopped` is True once a stop string was found.

    >>> text = TextStream(tokenizer, stop=("END",))    # doctest: +SKIP
    >>> text.advance(7042, ends=False, last=False)       # doctest: +SKIP
    (' Paris', None)
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self._decoder = tokenizer.decoder(start=False)
        self._stop = tuple(stop)
        self._held = ""
        self._emitted = 0
        self._logprobs: list[TokenLogprobs] = []
        self.stopped = False

    @property
    def offset(self) -> int:
        """Characters so far, those that are held back included."""
        return self._emitted + len(self._held)

    def advance(
        self, token: int, logprobs: TokenLogprobs | None = None, *, ends: bool, last: bool, stops: bool = True
    ) -> tuple[str, Literal["stop", "length"] | None]:
        """Adds a token: (text that became final, why the continuation ends or None while it goes on).

        ends: whether it is an end token, which is no part of the text. last: whether no token may follow. stops:
        whether stop strings end it yet; what is in the text before is not looked at again.
        """
        text = "" if ends else self.push(token, logprobs, stops)
        if not (ends or last or self.stopped):
            return text, None
        text += self.finish()
        # The rest of a character or a held back text may complete a stop string.
        return text, "stop" if ends or self.stopped else "length"

    def push(self, token: int, logprobs: TokenLogprobs | None = None, stops: bool = True) -> str:
        """Adds a token that ends nothing; returns the text that is final. stops: as in `advance`."""
        if logprobs is not None:
            self._logprobs.append(replace(logprobs, offset=self.offset))
        return self._add(self._decoder.push(token), stops)

    def finish(self) -> str:
        """The text that was held back; no token may follow."""
        if self.stopped:
            return ""
        text = self._add(self._decoder.finish())
        if not self.stopped:
            text, self._held = text + self._held, ""
            self._emitted += len(text)
        return text

    def take_logprobs(self, finished: bool) -> list[TokenLogprobs]:
        """Log probabilities of tokens whose text was returned; if finished, of all but those after a stop string."""
        if finished:
            out = [x for x in self._logprobs if not self.stopped or x.offset < self._emitted]
            self._logprobs = []
            return out
        count = sum(x.offset < self._emitted for x in self._logprobs)
        out, self._logprobs = self._logprobs[:count], self._logprobs[count:]
        return out

    def _add(self, text: str, stops: bool = True) -> str:
        if not (self._stop and stops):
            self._emitted += len(text)
            return text
        self._held += text
        ends = [index for index in (self._held.find(stop) for stop in self._stop) if index >= 0]
        if ends:
            self.stopped = True
            final, self._held = self._held[: min(ends)], ""
        else:
            keep = max(_overlap(self._held, stop) for stop in self._stop)
            cut = len(self._held) - keep
            final, self._held = self._held[:cut], self._held[cut:]
        self._emitted += len(final)
        return final


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop` (not all of it)."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
