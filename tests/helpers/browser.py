"""A page in headless Chromium, driven through its DevTools protocol: a real mouse and a real keyboard.

python -m tests.helpers.browser page.html picture.png      # a picture of a page of `attnzoo attention`
"""

import base64
import contextlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

PROGRAM = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(
    PROGRAM is None, reason="no Chromium is installed (apt-get install chromium-headless-shell)"
)
KEYS = {"Enter": 13, "Escape": 27, "Tab": 9, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}


class Browser:
    """One page. requests: addresses that it asked for; problems: what its script threw or its policy refused."""

    def __init__(self, reader: Any, writer: Any) -> None:
        self._reader, self._writer, self._numbers = reader, writer, itertools.count(1)
        self.requests: list[str] = []
        self.problems: list[str] = []
        self._session = ""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> Any:
        """Sends a command and returns its result."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._writer.write(json.dumps(message).encode() + b"\0")
        self._writer.flush()
        while True:
            answer = self._read()
            if answer.get("id") == number:
                assert "error" not in answer, answer["error"]
                return answer["result"]

    def _read(self) -> dict[str, Any]:
        data = bytearray()
        while (byte := self._reader.read(1)) != b"\0":
            assert byte, "the browser has ended"
            data += byte
        message: dict[str, Any] = json.loads(data)
        parameters = message.get("params", {})
        if message.get("method") == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])
        elif message.get("method") == "Runtime.exceptionThrown":
            self.problems.append(str(parameters["exceptionDetails"].get("exception", parameters)))
        elif message.get("method") == "Log.entryAdded" and parameters["entry"]["level"] == "error":
            self.problems.append(parameters["entry"]["text"])
        return message

    def open(self, page: Path | str, width: int = 1200, height: int = 900) -> None:
        """Shows a file or an address, and waits until it is loaded."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Page.navigate", url=page if isinstance(page, str) else page.resolve().as_uri())
        while self._read().get("method") != "Page.loadEventFired":
            pass

    def value(self, expression: str) -> Any:
        """What a JavaScript expression gives; of a promise, what it is kept with."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, condition: str) -> None:
        """Until a JavaScript expression holds: a quarter of a minute at most."""
        for _ in range(750):
            if self.value(f"Boolean({condition})"):
                return
            time.sleep(0.02)
        raise AssertionError(f"never: {condition}; {self.problems}")

    def text(self, selector: str) -> str:
        """The text of the first element that a CSS selector finds."""
        return str(self.value(f"document.querySelector({json.dumps(selector)}).textContent"))

    def hover(self, selector: str, across: float = 0.5, down: float = 0.5) -> tuple[float, float]:
        """Moves the mouse over an element, at a share of its width and height; returns where."""
        x, y = self.value(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)}); "
            "e.scrollIntoView({block: 'center'}); const b = e.getBoundingClientRect(); "
            f"return [b.left + b.width * {across}, b.top + b.height * {down}]; }})()"
        )
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        return x, y

    def click(self, selector: str) -> None:
        x, y = self.hover(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, key: str) -> None:
        code = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key]}
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, **code)

    def media(self, scheme: str) -> None:
        """Prefers "light" or "dark", and waits until the page has been drawn anew."""
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.value("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(0))))")

    def picture(self, path: Path) -> None:
        """Writes what is seen as PNG."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """A headless browser, which ends with the block."""
    assert PROGRAM is not None
    (to_read, to_write), (from_read, from_write) = os.pipe(), os.pipe()
    with tempfile.TemporaryDirectory(prefix="attnzoo-browser-", ignore_cleanup_errors=True) as profile:
        # Chromium reads commands from descriptor 3 and answers on 4; as root it runs without a sandbox only.
        options = f"--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --user-data-dir={profile}"
        command = f'exec "$0" {options} --remote-debugging-pipe about:blank 3<&{to_read} 4>&{from_write}'
        process = subprocess.Popen(
            ["bash", "-c", command, PROGRAM],
            pass_fds=(to_read, from_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(from_write)
        with os.fdopen(from_read, "rb") as reader, os.fdopen(to_write, "wb") as writer:
            try:
                yield Browser(reader, writer)
            finally:
                process.terminate()
                process.wait(20)


if __name__ == "__main__":
    with browser() as shown:
        shown.open(Path(sys.argv[1]), 1080, 720)
        shown.click("button[aria-label='layer 7, head 3']")
        shown.hover("#map", 0.41, 0.68)
        shown.picture(Path(sys.argv[2]))
