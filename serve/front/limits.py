"""The limits of `serve.front`, as plain values that reach Ray's proxy in an environment variable."""

import ipaddress
import json
import re
from dataclasses import asdict, dataclass, fields

VARIABLE = "ATTNZOO_FRONT"
"""Environment variable that passes the limits to the proxy's process, as JSON."""
MAX_HEADER_BYTES = 64 << 10
"""Limit for request line and headers together, and again for trailers."""
HOST_NAME = re.compile(r"(\*\.)?[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?)*")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The limits; `serve.config.ServeConfig` explains the fields."""

    host: str = "127.0.0.1"
    allowed_hosts: tuple[str, ...] | None = None
    api_key_env: str | None = None
    max_body_bytes: int = 1 << 20
    header_timeout_s: float = 10.0
    body_timeout_s: float = 30.0
    write_timeout_s: float = 60.0
    max_reading: int = 64

    def to_json(self) -> str:
        """The limits as JSON, for the environment variable."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | None) -> "Limits":
        """The limits from the JSON of `to_json`; the defaults for None. Raises ValueError that names the variable."""
        if not text:
            return cls()
        try:
            values = json.loads(text)
            unknown = set(values) - {field.name for field in fields(cls)}
            if unknown:
                raise ValueError(f"unknown key {sorted(unknown)[0]!r}")
            hosts = values.get("allowed_hosts")
            return cls(**{**values, "allowed_hosts": None if hosts is None else tuple(hosts)})
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{VARIABLE} does not hold the limits of the front as JSON ({error})") from None


def check_host_name(name: object) -> str:
    """An entry of `allowed_hosts` (a host name, "*.domain", an IP address, or "*") in lower case and without brackets.
    Raises ValueError that names it."""
    if isinstance(name, str):
        plain = name.lower().removeprefix("[").removesuffix("]")
        if name == "*" or HOST_NAME.fullmatch(plain) or to_address(plain) is not None:
            return plain
    raise ValueError(
        f"allowed_hosts: {name!r} is not a host name; write names without scheme, port or path, "
        'such as "api.example.com", "*.example.com", "10.0.0.5", or "*" for any'
    )


def to_address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The IP address in a text; None for anything else, such as zones, octal or short forms."""
    try:
        return None if "%" in text else ipaddress.ip_address(text)
    except ValueError:
        return None
