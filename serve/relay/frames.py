"""What both ends of the socket share: its address, who may be at the other end, and how events are written.

A frame is the number of an answer (8 bytes), the length of what follows (4 bytes, at most `MOST`), and that much of the
answer's body. Length 0 is its end. Numbers are random: who does not know one cannot add to its answer. The socket is of
Linux's abstract namespace: it has no file, so that nothing is left behind by a process that is killed, and no rights,
so that either end asks the system whose process the other one is.
"""

import os
import socket
import struct
import sys
from collections.abc import Iterator

HEADER = b"x-attnzoo-relay"
"""Of a request: name of the proxy's socket and number of the answer. Of an answer: its events come by the socket.
Clients neither send nor see it."""
SUPPORTED = sys.platform == "linux"
"""Whether this system has abstract sockets."""
MOST = 1 << 20
"""Bytes of a body in one frame."""
_FRAME = struct.Struct("!QI")
_CREDENTIALS = struct.Struct("3i")  # process, user and group of the other end (unix(7), SO_PEERCRED)


def address(name: str) -> str:
    """The address of the socket with this name."""
    return f"\0attnzoo-relay-{name}"


def is_own(connection: socket.socket) -> bool:
    """Whether the process at the other end belongs to the user of this one."""
    found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return bool(_CREDENTIALS.unpack(found)[1] == os.getuid())


def frames(number: int, data: bytes) -> bytes:
    """Some of an answer's body; without data its end."""
    parts = [data[at : at + MOST] for at in range(0, max(len(data), 1), MOST)]
    return b"".join(_FRAME.pack(number, len(part)) + part for part in parts)


class Frames:
    """Finds frames in what arrives, which may begin and end anywhere."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[tuple[int, bytes]]:
        """(number of the answer, some of its body) of all frames that are complete. Raises ValueError for one that is
        longer than any may be."""
        data, at = self._rest + data, 0
        while len(data) - at >= _FRAME.size:
            number, length = _FRAME.unpack_from(data, at)
            if length > MOST:
                raise ValueError(f"a frame of {length} bytes, and {MOST} is the most")
            end = at + _FRAME.size + length
            if end > len(data):
                break
            yield number, data[at + _FRAME.size : end]
            at = end
        self._rest = data[at:]


def without(headers: list[tuple[bytes, bytes]]) -> tuple[list[tuple[bytes, bytes]], bytes | None]:
    """The headers without `HEADER`, and its value if it was there once."""
    found = [value for name, value in headers if bytes(name).lower() == HEADER]
    kept = [(name, value) for name, value in headers if bytes(name).lower() != HEADER]
    return kept, found[0] if len(found) == 1 else None
