"""A client for any endpoint with OpenAI's interface: answers of a chat model, and a model's likeliest next tokens.

What may pass (a server that is busy or restarts, a connection that breaks) is tried again; what will not (a field that
the server refuses, a wrong key) raises `RefusedError` at once.
"""

import json
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpx

TRIED_AGAIN = (408, 409, 425, 429, 500, 502, 503, 504)
MOST_WAIT_S = 20.0
JSON = {"content-type": "application/json"}


class EndpointError(OSError):
    """A request failed as often as it was tried; the message says how the last time."""


class RefusedError(ValueError):
    """The endpoint refuses a request, or answers what its interface does not have; trying again would not help."""


STOP, LENGTH, UNSAID = "stop", "length", "unsaid"
"""How answers end: by themselves; at the limit of tokens; the endpoint does not say."""
LONGEST_REASON = 40


class Answer(NamedTuple):
    """text: of a chat model. ended: the endpoint's `finish_reason`. Only an answer that ended by "stop" is whole: what
    follows may have been stopped, filtered, or be a call, and its last word is nobody's."""

    text: str
    ended: str = STOP

    @property
    def is_cut(self) -> bool:
        """Whether it did not end by itself, perhaps within a sentence."""
        return self.ended != STOP

    def entry(self) -> dict[str, str]:
        """For a journal."""
        return {"text": self.text, **({"ended": self.ended} if self.is_cut else {})}

    @classmethod
    def of_entry(cls, entry: Mapping[str, Any]) -> "Answer":
        """What `entry` gave. Journals of before have "cut" for the limit of tokens and no other end."""
        return cls(str(entry["text"]), str(entry.get("ended", LENGTH if entry.get("cut") else STOP)))


@dataclass
class Endpoint:
    """url: up to and without /chat/completions, for example http://127.0.0.1:8000/v1. key: sent as a bearer token.
    model: the model's name; "" takes the only one that the endpoint lists. tries: of each request. wait_s: before the
    second try; doubled before each later one."""

    url: str
    model: str = ""
    key: str = field(default="", repr=False)
    timeout_s: float = 300.0
    tries: int = 4
    wait_s: float = 1.0

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url={self.url!r} must begin with http:// or https://, and usually ends with /v1")
        if any(letter.isspace() for letter in self.url):
            raise ValueError(f"url={self.url!r} has white space in it; leave it out")
        try:
            parts = urlsplit(self.url)
            whole = bool(parts.hostname) and parts.port != 0
        except ValueError:  # a port that is no number, or above 65535
            whole = False
        if not whole:
            raise ValueError(f"url={self.url!r} must have a host, and a port of 1 to 65535 where it names one")
        if self.tries < 1:
            raise ValueError(f"tries={self.tries} must be at least 1")
        if not self.key.isascii() or any(not letter.isprintable() or letter.isspace() for letter in self.key):
            raise ValueError("key holds a character that no header may have, as white space; give the key alone")
        headers = {"authorization": f"Bearer {self.key}"} if self.key else {}
        self._client = httpx.Client(headers=headers, timeout=self.timeout_s)
        self.url = self.url.rstrip("/")
        self.model = self.model or self._only_model()

    def __enter__(self) -> "Endpoint":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()

    def answer(self, prompt: str, *, temperature: float, max_tokens: int, seed: int) -> Answer:
        """A chat model's answer to one message. Raises EndpointError and RefusedError."""
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": temperature,
            "max_tokens": max_tokens,
            "seed": seed,
        }
        choice = self._first(self._post("/chat/completions", body), "choices")
        text = self._read(choice, "message", "content")
        if not isinstance(text, str | None):
            raise RefusedError(
                f"{self.url} answered with a {type(text).__name__}, not a text; is it OpenAI's interface?"
            )
        ended = choice.get("finish_reason")
        if not isinstance(ended, str | None):
            raise RefusedError(
                f"{self.url} answered with a {type(ended).__name__} as 'finish_reason'; is it OpenAI's interface?"
            )
        return Answer(text or "", (ended or UNSAID)[:LONGEST_REASON])

    def next_tokens(self, prompt: str, count: int) -> dict[str, float]:
        """Log probabilities of the likeliest next tokens of a text, by token. Raises EndpointError and RefusedError."""
        body = {"model": self.model, "prompt": prompt, "max_tokens": 1, "temperature": 0, "logprobs": count}
        told = self._read(self._first(self._post("/completions", body), "choices"), "logprobs")
        top = self._first(told, "top_logprobs") if told is not None else None
        if not isinstance(top, dict):
            raise RefusedError(f"{self.url} gave no top_logprobs; it does not support logprobs={count} for completions")
        for token, value in top.items():
            if not is_logprob(value):
                raise RefusedError(f"{self.url} gave {token!r} the log probability {value!r}, which is none")
        return {str(token): float(value) for token, value in top.items()}

    def _only_model(self) -> str:
        listed = self._read(self._send("GET", "/models", None), "data")
        names = [self._read(entry, "id") for entry in listed] if isinstance(listed, list) else [None]
        known = [name for name in names if isinstance(name, str) and name]
        if len(known) < len(names):
            raise RefusedError(f"{self.url}/models lists no models by their ids; is it OpenAI's interface?")
        if not known:
            raise ValueError(
                f"{self.url} lists no model; start its server with one, or name one that it has all the same"
            )
        if len(known) > 1:
            raise ValueError(f"{self.url} has {len(known)} models; name one of them: {', '.join(known)}")
        return known[0]

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        return self._send("POST", path, body)

    def _send(self, method: str, path: str, body: dict[str, Any] | None) -> Any:
        content, problem = None if body is None else _dump(body), ""
        for turn in range(self.tries):
            if turn:
                time.sleep(min(self.wait_s * 2 ** (turn - 1), MOST_WAIT_S))
            try:
                response = self._client.request(method, self.url + path, content=content, headers=JSON)
            except (httpx.TransportError, httpx.DecodingError) as error:
                problem = f"{type(error).__name__}: {error}"
                continue
            except httpx.InvalidURL as error:
                raise ValueError(f"url={self.url!r} is none ({error})") from None
            if response.status_code in TRIED_AGAIN:
                problem = f"status {response.status_code}: {_said(response)}"
            elif response.is_error:
                raise RefusedError(
                    f"{self.url}{path} refuses the request (status {response.status_code}): {_said(response)}"
                )
            else:
                return self._json(response, path)
        raise EndpointError(f"{self.url}{path} failed {self.tries} times; the last time: {problem}")

    def _json(self, response: httpx.Response, path: str) -> Any:
        try:
            return response.json()
        except (ValueError, RecursionError):
            raise RefusedError(f"{self.url}{path} answered no JSON: {response.text[:200]!r}") from None

    def _read(self, content: Any, *path: str) -> Any:
        """content[path[0]][path[1]]... Raises RefusedError for other content."""
        for name in path:
            if not isinstance(content, dict) or name not in content:
                raise RefusedError(f"{self.url} answered without {name!r}; is it OpenAI's interface?")
            content = content[name]
        return content

    def _first(self, content: Any, name: str) -> Any:
        """The first entry of the list content[name]. Raises RefusedError for other content, and for an empty list."""
        listed = self._read(content, name)
        if not isinstance(listed, list) or not listed:
            told = "an empty list" if listed == [] else f"a {type(listed).__name__}"
            raise RefusedError(f"{self.url} answered with {told} as {name!r}; is it OpenAI's interface?")
        return listed[0]


def told_ends(ends: Iterable[str]) -> str:
    """How cut answers ended, the most frequent first: "'length'", or "3 by 'length', 1 by 'content_filter'"."""
    counts = Counter(ends).most_common()
    return repr(counts[0][0]) if len(counts) == 1 else ", ".join(f"{count:,} by {end!r}" for end, count in counts)


def way_out(ends: Iterable[str], most: int, answers: Path | None) -> str:
    """What helps against cut answers. most: the limit of tokens. answers: the file that keeps them, which refuses
    another limit."""
    if set(ends) != {LENGTH}:
        return "take another --model"
    other = f", and name another --answers: '{answers}' belongs to this limit" if answers else ""
    return f"raise --max-tokens={most}{other}"


def is_logprob(value: Any) -> bool:
    """Whether it is the logarithm of a probability; rounding may lead a little above 0."""
    return isinstance(value, int | float) and not isinstance(value, bool) and value < 1e-3


def _dump(body: Mapping[str, Any]) -> bytes:
    """JSON of a request. Halves of characters, as of an emoji that another server cut, become question marks: no text
    in UTF-8 has them, and a judge is asked about texts as they came."""
    return json.dumps(body, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace")


def _said(response: httpx.Response) -> str:
    """The error's message of OpenAI's interface, else the beginning of the body."""
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return response.text[:200]
