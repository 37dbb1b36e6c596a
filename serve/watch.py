"""Checks a running server as a client would, and prints problems that Ray writes only to its logs."""

import http.client
import json
import threading
import time
from collections.abc import Callable
from urllib.parse import urlsplit

from serve.front.hosts import reachable

EVERY_S = 2.0
"""Seconds between checks."""
ANSWER_S = 10.0
GIVE_UP_S = 120.0
"""Seconds without an answer from Ray itself after which the command ends."""


class Watch:
    """Call `look` every `EVERY_S` seconds. state: returns Ray's status of the server, or raises. say: prints a line."""

    def __init__(self, url: str, state: Callable[[], str], say: Callable[[str], None]) -> None:
        self._port = urlsplit(url).port
        host = urlsplit(url).hostname or ""
        self._host = reachable(host)
        self._state, self._say = state, say
        self._down_since: float | None = None
        self._silent_since: float | None = None
        self._said = ""

    def look(self) -> bool:
        """Checks the server and prints changes; False once Ray has not answered for `GIVE_UP_S` seconds."""
        problem = self._probe()
        now = time.monotonic()
        if problem is None:
            if self._down_since is not None:
                self._say(f"answering again after {now - self._down_since:.0f} s")
            self._down_since = self._silent_since = None
            self._said = ""
            return True
        self._down_since = self._down_since or now
        state, alive = self._ask()
        if f"{problem} {state}" != self._said:
            self._said = f"{problem} {state}"
            self._say(f"not answering: {problem} ({state})")
        self._silent_since = None if alive else self._silent_since or now
        return self._silent_since is None or now - self._silent_since < GIVE_UP_S

    def _probe(self) -> str | None:
        """The problem that a request to /health shows; None if the server is healthy."""
        connection = http.client.HTTPConnection(self._host, self._port, timeout=ANSWER_S)
        try:
            connection.request("GET", "/health", headers={"host": "localhost"})
            response = connection.getresponse()
            body = response.read()
        except (OSError, http.client.HTTPException) as error:
            return f"/health: {type(error).__name__}: {error}"
        finally:
            connection.close()
        if response.status == 200:
            return None
        try:
            return f"/health: {response.status}, {json.loads(body)['error']['message']}"
        except (ValueError, KeyError, TypeError):
            return f"/health: {response.status}"

    def _ask(self) -> tuple[str, bool]:
        """(Ray's status of the server or an error message, whether Ray answered)."""
        answers: list[tuple[str, bool]] = []

        def ask() -> None:
            try:
                answers.append((self._state(), True))
            except Exception as error:
                answers.append((f"Ray does not answer: {type(error).__name__}", False))

        # A daemon thread, because a call that never returns must not keep the command from ending.
        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(ANSWER_S)
        return answers[0] if answers else (f"Ray does not answer within {ANSWER_S:g} s", False)
