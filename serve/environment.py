"""Sets the environment variables that Ray reads when it is imported. This module does not import Ray."""

import contextlib
import os
import secrets
import tempfile
from pathlib import Path

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SERVE_ENABLE_HA_PROXY": "0",  # its proxy ignores `host` and listens on all interfaces
    # The engine's thread never blocks the event loop, so that a second loop would only add hops.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    # Two messages of Ray's own for each answer cost less than objects in its store.
    "RAY_SERVE_PROXY_USE_GRPC": "1",
    # Ray runs its processes at nice 15: the server would wait for everything else on the machine, its clients included.
    "RAY_worker_niceness": "0",
    # Without a cluster, Ray then takes loopback for the node's address instead of a public one.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # Ray's memory monitor kills Ray's processes when memory runs out, even if others have used it.
    "RAY_memory_monitor_refresh_ms": "0",
    # By default Ray kills a proxy that misses three checks of 5 s, as one does that starts on a busy machine.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "30",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "attnzoo.apps:proxy",
}


def prepare_environment(cache: Path) -> None:
    """Turns off Ray's usage reports and turns on its token authentication. Call it before importing Ray.

    The token comes from the environment, or else from a file in `cache` that only its owner can read. It is made at
    random once, and other servers of this user use it too. RAY_AUTH_MODE=disabled is respected.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    if os.environ.setdefault("RAY_AUTH_MODE", "token") != "token":
        return
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return
    path = cache.resolve() / "ray_token"
    if not path.exists():
        _write_token(path)
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(path)


def _write_token(path: Path) -> None:
    """Writes a random token atomically; when several servers start at once, the first one's token is kept."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # only its owner can read it
    try:
        with os.fdopen(handle, "w") as file:
            file.write(secrets.token_hex(32))
        with contextlib.suppress(FileExistsError):
            os.link(name, path)
    finally:
        os.unlink(name)
