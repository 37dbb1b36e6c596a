"""The front inside Ray's HTTP proxy.

`attnzoo serve` puts it there. On a cluster of your own, export this where Ray is started, on every node:

    RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=serve.front.proxy:middlewares
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


def middlewares() -> list[Middleware]:
    """Called by Ray in the proxy's process before it listens; the innermost first."""
    limits = Limits.from_json(os.environ.get(VARIABLE))
    # Ray makes uvicorn's configuration without a choice of protocol; this is the one that "auto" then means.
    uvicorn.config.HTTP_PROTOCOLS["auto"] = bounded_protocol(limits)  # type: ignore[assignment]
    return [Middleware(ReplicaRetry), *reversed(guard(limits))]


class ReplicaRetry(Retry):
    """`Retry` that asks Ray's router how many replicas there are."""

    def __init__(self, app: ASGIApp) -> None:
        super().__init__(app, lambda: count_replicas(app))


def count_replicas(app: Any) -> int | None:
    """Replicas that the proxy's router knows of for the application at "/"; None where Ray 2.60's insides changed.

    The router learns of a death at the first request that fails, Ray's controller only at its next look; there is no
    public way to ask it. tests/faults/test_serve_replica_dies.py kills a replica.
    """
    while not hasattr(app, "proxy_router"):
        if not hasattr(app, "_app"):
            return None
        app = app._app
    try:
        found = app.proxy_router.match_route("/")
        if found is None:
            return None if app.proxy_router.route_info else 0
        router = found[1]._router
        return None if router is None else len(router._asyncio_router._request_router.curr_replicas)
    except AttributeError:
        return None
