"""Finds a port to listen on."""

import socket


def free_port(host: str, port: int) -> int:
    """Returns `port`, or a free port for 0. Raises ValueError if it is taken, which Ray would report only in a log."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ValueError(
                f"cannot listen on {host}:{port} ({error.strerror}); choose another port, or a host that is an IPv4 "
                "address or name of this machine"
            ) from None
        found: int = probe.getsockname()[1]
        return found
