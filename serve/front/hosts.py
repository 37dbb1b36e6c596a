"""Checks the Host and Origin headers against the names of this server.

A web page can make its visitor's browser send requests to a server on the visitor's machine: directly to 127.0.0.1 (the
page's address is then in Origin), or by DNS rebinding, which points the page's own name to 127.0.0.1 (the name is then
in Host). So Host must be a name of this server, and so must Origin if it is present.
"""

import re
import socket
from urllib.parse import urlsplit

from serve.front.limits import Limits, to_address

HOST = re.compile(r"(?P<name>\[[0-9a-f:.]+\]|[a-z0-9_.-]+)(:\d{0,5})?")


def is_loopback(host: str) -> bool:
    """Whether a server that listens on a host can be reached from its own machine alone."""
    address = to_address(host.strip("[]"))
    return host == "localhost" or (address is not None and address.is_loopback)


def reachable(host: str) -> str:
    """A host name by which this machine reaches a server that listens on `host`: 0.0.0.0 is no address to send to."""
    address = to_address(host.strip("[]"))
    return "127.0.0.1" if address is not None and address.is_unspecified else host


class Hosts:
    """The names of a server.

    Names of loopback are always accepted, because no page can own them. A server that listens beyond loopback also
    accepts IP addresses (unlike names, they cannot be pointed elsewhere) and the machine's own name. Other names must
    be in `allowed_hosts`.
    """

    def __init__(self, limits: Limits) -> None:
        self._beyond = not is_loopback(limits.host)
        allowed = limits.allowed_hosts or ()
        self._any = "*" in allowed
        self._exact = {name for name in allowed if not name.startswith("*")}
        self._suffixes = tuple(name[1:] for name in allowed if name.startswith("*."))
        if self._beyond:
            self._exact |= {socket.gethostname().lower(), limits.host.lower()}

    def accepts(self, host: str) -> bool:
        """Whether a Host header (or the host and port of an Origin) names this server."""
        found = HOST.fullmatch(host.lower())
        if found is None:
            return False
        name = found["name"].strip("[]").removesuffix(".")
        address = to_address(name)
        if is_loopback(name):
            return True
        if self._any or name in self._exact or name.endswith(self._suffixes):
            return True
        return address is not None and self._beyond

    def accepts_origin(self, origin: str) -> bool:
        """Whether pages of this origin may send requests: only those of this server's names, on any port."""
        try:
            parts = urlsplit(origin)
        except ValueError:
            return False
        return parts.scheme in ("http", "https") and self.accepts(parts.netloc)
