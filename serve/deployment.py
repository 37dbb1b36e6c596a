"""The server on Ray Serve: the only file that knows Ray.

    serve run serve.deployment:app checkpoint=runs/demo/export max_num_seqs=8
    python -m serve --checkpoint runs/demo/export

One deployment is ingress and engine in one, so a token makes one hop: from the replica to Ray's HTTP proxy.
"""

import logging
import socket
from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray import serve
from ray.serve.config import HTTPOptions
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from serve.async_engine import AsyncEngine
from serve.config import ServeConfig, absolute, build_serve_config, parse_value
from serve.engine import Engine
from serve.openai.routes import build_app

APP_NAME = "attnzoo"
RUN_ONLY = ("host", "port", "num_cpus", "cluster")
"""Settings of the process that starts Ray; `serve run` has its own ways to say them."""


@serve.ingress()
class Server:
    """One replica: an engine in a thread, and the HTTP application in front of it."""

    def __init__(self, config: ServeConfig) -> None:
        self._config = config
        keep_on_loopback()
        self._engine = AsyncEngine(Engine(config))

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Ray asks for the application here, after the constructor."""
        return build_app(self._engine, self._config)

    def check_health(self) -> None:
        """Called by Ray every few seconds: a replica that raises is replaced."""
        problem = self._engine.health()
        if problem is not None:
            raise RuntimeError(problem)

    async def drain(self) -> bool:
        """Refuses new requests and waits for the running ones; False when some did not end in time."""
        return await self._engine.drain(self._config.drain_timeout_s)


def keep_on_loopback() -> None:
    """Keeps the replica's own gRPC server on loopback where the node is.

    Ray 2.60 binds it to all interfaces, after the constructor. The token guards it, but who has no business with it
    should not reach it; tests/integration/test_serve_ray.py lists the sockets.
    """
    if ray.util.get_node_ip_address() != "127.0.0.1":
        return
    from ray.serve._private import replica

    add_port = replica.add_port_to_grpc_server
    replica.add_port_to_grpc_server = lambda server, address: add_port(server, address.replace("[::]", "127.0.0.1"))


def build(config: ServeConfig) -> serve.Application:
    """The application of a configuration. The API key's variable must be set where the replica runs."""
    # Admission is the engine's: Ray's own limits would answer in another shape. Room above them lets 429 out.
    limit = 4 * (config.max_num_seqs + config.max_queue) + 64
    options: dict[str, Any] = {
        "max_ongoing_requests": limit,
        "graceful_shutdown_timeout_s": config.drain_timeout_s,
        "graceful_shutdown_wait_loop_s": 0.1,
        "health_check_period_s": 5.0,
        # Ray hides GPUs from replicas that ask for none.
        "ray_actor_options": {"num_cpus": 1, "num_gpus": int(config.device.startswith("cuda"))},
    }
    return serve.deployment(name="attnzoo", num_replicas=1, **options)(Server).bind(config)


def app(args: Mapping[str, Any]) -> serve.Application:
    """What `serve run serve.deployment:app key=value ...` calls. Raises ValueError for keys it does not know."""
    values = {key: parse_value(key, value) for key, value in args.items()}
    for key in RUN_ONLY:
        if key in values:
            raise ValueError(
                f"{key} is set by Ray's own options under `serve run`; leave it out, or use python -m serve"
            )
    if "checkpoint" in values:
        values["checkpoint"] = absolute(values["checkpoint"])
    return build(build_serve_config(values))


def start(config: ServeConfig, connected: Callable[[], None]) -> str:
    """Starts a local Ray (or joins `config.cluster`), deploys, waits until it answers; returns the base URL.

    `connected` is called once Ray has installed its signal handlers and before clients can see the server: the place
    to install one's own. Call `prepare_environment` before this module is imported: it turns Ray's token
    authentication on.
    Raises ValueError for what the configuration got wrong, RuntimeError when the deployment does not come up.
    """
    application = build(config)
    port = free_port(config.host, config.port)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    if config.cluster is None:
        ray.init(
            num_cpus=config.num_cpus,
            include_dashboard=False,
            _node_ip_address="127.0.0.1",
            log_to_driver=False,
            logging_level=logging.WARNING,
        )
    else:
        ray.init(address=config.cluster, log_to_driver=False)
    connected()
    serve.start(proxy_location="HeadOnly", http_options=HTTPOptions(host=config.host, port=port))
    serve.run(application, name=APP_NAME, route_prefix="/")
    return f"http://{config.host}:{port}"


def free_port(host: str, port: int) -> int:
    """`port`, or a free one for 0. Raises ValueError when it is taken: Ray would only say so in a log file."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ValueError(f"cannot listen on {host}:{port} ({error.strerror}); choose another port") from None
        found: int = probe.getsockname()[1]
        return found


def drain(timeout_s: float) -> bool:
    """Asks the replica to finish what runs; False when it could not in time."""
    handle: DeploymentHandle = serve.get_app_handle(APP_NAME)
    try:
        return bool(handle.drain.remote().result(timeout_s=timeout_s + 5.0))
    except Exception:
        return False


def stop(config: ServeConfig) -> None:
    """Ends the application, and Ray's processes where `start` started them; others' applications stay."""
    if not ray.is_initialized():
        return
    if config.cluster is not None:
        serve.delete(APP_NAME)
    ray.shutdown()
