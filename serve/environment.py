"""What Ray reads from the environment when it is imported; so this comes first, and imports nothing of Ray."""

import contextlib
import os
import secrets
import tempfile
from pathlib import Path

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SERVE_ENABLE_HA_PROXY": "0",  # its proxy listens on all interfaces, whatever the host says
    # The engine has a thread of its own and never blocks the event loop, so a second loop would only cost hops.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    # Where Ray expects no cluster it takes loopback for the node's address; elsewhere it looks up a public one.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # Ray's memory monitor kills its own processes when the machine is full, whoever filled it.
    "RAY_memory_monitor_refresh_ms": "0",
    # Ray kills a proxy that does not answer three times in 5 s, also while it still starts on a busy machine.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "30",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve.front.proxy:middlewares",
}


def prepare_environment(cache: Path) -> None:
    """Turns usage reports off and Ray's token authentication on, before Ray is imported.

    The token is the environment's if it has one, else a random one that is kept in `cache`, readable only by its
    owner, so that a second server of this project can be started or joined. RAY_AUTH_MODE=disabled is left alone.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    if os.environ.setdefault("RAY_AUTH_MODE", "token") != "token":
        return
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return
    path = cache.resolve() / "ray_token"
    if not path.exists():
        _leave_token(path)
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(path)


def _leave_token(path: Path) -> None:
    """Writes a token that is there whole or not at all; of several servers that start at once the first one's stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # for its owner's eyes only
    try:
        with os.fdopen(handle, "w") as file:
            file.write(secrets.token_hex(32))
        with contextlib.suppress(FileExistsError):
            os.link(name, path)
    finally:
        os.unlink(name)
