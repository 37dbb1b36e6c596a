"""Installs `serve.front` in Ray's HTTP proxy.

`attnzoo serve` does it for a local Ray. On a cluster, export this on every node where Ray is started:

    RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=attnzoo.apps:proxy
    ATTNZOO_FRONT='{"host": "0.0.0.0", "allowed_hosts": ["api.example.com"]}'     # see serve.front.limits
"""

import os
from typing import Any

import uvicorn.config
from starlette.middleware import Middleware
from starlette.types import ASGIApp

from serve.front.guard import guard
from serve.front.limits import VARIABLE, Limits
from serve.front.protocol import bounded_protocol
from serve.front.retry import Retry
from serve.relay.receiver import Relay


def middlewares() -> list[Middleware]:
    """The middleware of Ray's proxy, the innermost first; Ray calls it in the proxy's process before it listens."""
    limits = Limits.from_json(os.environ.get(VARIABLE))
    # Ray lets uvicorn choose the protocol; "auto" then means this one.
    uvicorn.config.HTTP_PROTOCOLS["auto"] = bounded_protocol(limits)  # type: ignore[assignment]
    return [Middleware(Relay), Middleware(ReplicaRetry), *reversed(guard(limits))]


class ReplicaRetry(Retry):
    """`Retry` with the number of replicas from Ray's router."""

    def __init__(self, app: ASGIApp) -> None:
        super().__init__(app, lambda: count_replicas(app))


def count_replicas(app: Any) -> int | None:
    """Number of replicas that the proxy's router knows for the application at "/"; None if Ray's internals are not as
    in Ray 2.60.

    The router notices a dead replica at the first request that fails, Ray's controller later. There is no public way to
    ask the router. tests/faults/test_serve_replica_dies.py kills a replica.
    """
    while not hasattr(app, "proxy_router"):
        app = getattr(app, "app", None) or getattr(app, "_app", None)
        if app is None:
            return None
    try:
        found = app.proxy_router.match_route("/")
        if found is None:
            return None if app.proxy_router.route_info else 0
        router = found[1]._router
        return None if router is None else len(router._asyncio_router._request_router.curr_replicas)
    except AttributeError:
        return None
