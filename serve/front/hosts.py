"""Which names this server answers to.

A web page anywhere can make its visitor's browser send requests to a server on that visitor's machine: by plain
requests to 127.0.0.1 (the browser then says the page's own address in Origin), or by giving its own name the address
127.0.0.1 once the page is loaded (the browser then says that name in Host). So Host must be a name of this server, and
Origin, where there is one, too.
"""

import re
import socket
from urllib.parse import urlsplit

from serve.front.limits import Limits, to_address

HOST = re.compile(r"(?P<name>\[[0-9a-f:.]+\]|[a-z0-9_.-]+)(:\d{0,5})?")


class Hosts:
    """Decides by a server's settings.

    The names of loopback are always good: no page can own them. A server that listens beyond loopback also answers
    to addresses (a name can be made to point anywhere, an address cannot) and to the machine's own name; to anything
    else only where `allowed_hosts` says so.
    """

    def __init__(self, limits: Limits) -> None:
        address = to_address(limits.host.strip("[]"))
        self._beyond = limits.host != "localhost" and not (address is not None and address.is_loopback)
        allowed = limits.allowed_hosts or ()
        self._any = "*" in allowed
        self._exact = {name for name in allowed if not name.startswith("*")}
        self._suffixes = tuple(name[1:] for name in allowed if name.startswith("*."))
        if self._beyond:
            self._exact |= {socket.gethostname().lower(), limits.host.lower()}

    def accepts(self, host: str) -> bool:
        """Whether a Host header, or the host of an Origin with its port, names this server."""
        found = HOST.fullmatch(host.lower())
        if found is None:
            return False
        name = found["name"].strip("[]").removesuffix(".")
        address = to_address(name)
        if name == "localhost" or (address is not None and address.is_loopback):
            return True
        if self._any or name in self._exact or name.endswith(self._suffixes):
            return True
        return address is not None and self._beyond

    def accepts_origin(self, origin: str) -> bool:
        """Whether pages of this origin may send requests: those of this server's own names, on any port."""
        try:
            parts = urlsplit(origin)
        except ValueError:
            return False
        return parts.scheme in ("http", "https") and self.accepts(parts.netloc)
