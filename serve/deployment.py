"""The server on Ray Serve. Only this file imports Ray.

    attnzoo serve --checkpoint runs/demo
    serve run attnzoo.apps:server checkpoint=runs/demo max_num_seqs=8
    serve deploy configs/serve/ray/deploy.yaml
    ATTNZOO_SERVE_CONFIG=configs/serve/smollm2.yaml serve build attnzoo.apps:application -o deploy.yaml

One deployment holds the HTTP application and the engine, so that a token makes one hop, to Ray's HTTP proxy.
"""

import asyncio
import contextlib
import logging
import os
import re
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import HTTPOptions
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ApplicationStatus
from starlette.types import ASGIApp

from attnzoo.apps import directory, variables
from attnzoo.report import available_cores
from serve.async_engine import AsyncEngine
from serve.clinical.clinic import Clinic
from serve.clinical.loading import load_clinic
from serve.config import MAX_THREADS, ServeConfig, absolute_paths, build_serve_config, parse_value, read_config_file
from serve.drawing.loading import load_studio
from serve.drawing.studio import Studio
from serve.engine import Engine
from serve.front.hosts import reachable
from serve.front.limits import VARIABLE
from serve.front.port import free_port
from serve.kinds import is_language
from serve.openai.routes import build_app
from serve.processes import LocalRay, sigterm_held_back

APP_NAME = "attnzoo"
_local: list[LocalRay] = []
"""The local Ray that `start` has started, until `stop` ends it; at most one in a process."""
RUN_ONLY = ("host", "port", "num_cpus", "cluster")
"""Settings of the process that starts Ray; under `serve run` Ray's own options set them."""
CONFIG_VARIABLE = "ATTNZOO_SERVE_CONFIG"
"""Environment variable that names the YAML file of settings for `application`."""


@serve.ingress()
class Server:
    """One replica: an engine in a thread, clinical models, a diffusion model, or several of these, and their HTTP
    application."""

    def __init__(self, config: ServeConfig) -> None:
        self._config = config
        keep_on_loopback()
        engine, self._clinic, self._studio = load_apart(config)
        self._engine = None if engine is None else AsyncEngine(engine)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Returns the application; Ray calls it after the constructor."""
        return build_app(self._engine, self._config, self._clinic, self._studio)

    def check_health(self) -> None:
        """Raises RuntimeError if the engine has failed; Ray calls it regularly and then replaces the replica."""
        problem = None if self._engine is None else self._engine.health()
        if problem is not None:
            raise RuntimeError(problem)

    async def drain(self) -> bool:
        """Refuses new requests and waits for running ones; False if some did not finish in time."""
        parts = [part for part in (self._engine, self._clinic, self._studio) if part is not None]
        return all(await asyncio.gather(*(part.drain(self._config.drain_timeout_s) for part in parts)))


Loaded = tuple[Engine | None, Clinic | None, Studio | None]


def load(config: ServeConfig) -> Loaded:
    """What a configuration serves. Raises ValueError."""
    engine = Engine(config) if is_language(config.checkpoint) else None
    return engine, load_clinic(config), load_studio(config)


def load_apart(config: ServeConfig) -> Loaded:
    """`load` in a thread that ends.

    OpenMP keeps a team of threads for each thread that has computed in parallel, until it ends. While all teams
    together have more threads than there are cores, none waits awake: a step of a small model takes twice as long.
    """
    with ThreadPoolExecutor(1) as loading:
        return loading.submit(load, config).result()


def keep_on_loopback() -> None:
    """Binds the replica's gRPC server to loopback if the Ray node is on loopback.

    Ray 2.60 binds it to all interfaces after the constructor. Ray's token guards it, but others should not even reach
    it; tests/integration/test_serve_ray.py lists the sockets.
    """
    if ray.util.get_node_ip_address() != "127.0.0.1":
        return
    from ray.serve._private import replica

    add_port = replica.add_port_to_grpc_server
    replica.add_port_to_grpc_server = lambda server, address: add_port(server, address.replace("[::]", "127.0.0.1"))


def build(config: ServeConfig) -> serve.Application:
    """The Ray Serve application for a configuration. The API key's variable must be set where the replica runs."""
    # The engine limits requests; Ray's limit is higher, so that the engine's answer 429 reaches the client.
    limit = 4 * (config.max_num_seqs + config.max_queue + config.max_predictions + config.max_drawings) + 64
    options: dict[str, Any] = {
        "max_ongoing_requests": limit,
        "graceful_shutdown_timeout_s": config.drain_timeout_s,
        "graceful_shutdown_wait_loop_s": 0.1,
        "health_check_period_s": 5.0,
        # Ray hides GPUs from replicas that do not request any.
        "ray_actor_options": {"num_cpus": 1, "num_gpus": int(config.device.startswith("cuda"))},
    }
    if found := variables():  # an installed package: the replica finds no `serve` by itself
        options["ray_actor_options"]["runtime_env"] = {"env_vars": found}
    return serve.deployment(name="attnzoo", num_replicas=1, **options)(Server).bind(config)


def with_threads(config: ServeConfig) -> ServeConfig:
    """The configuration for a local Ray with a thread of torch for each core, unless it or OMP_NUM_THREADS says how
    many. Ray by itself gives each of its processes one."""
    if config.cluster is not None or config.threads is not None or "OMP_NUM_THREADS" in os.environ:
        return config
    return replace(config, threads=min(available_cores(), MAX_THREADS))


def app(args: Mapping[str, Any]) -> serve.Application:
    """The application for `serve run attnzoo.apps:server key=value ...`. Raises ValueError for unknown keys."""
    values = {key: parse_value(key, value) for key, value in args.items()}
    for key in RUN_ONLY:
        if key in values:
            raise ValueError(f"{key} is set by Ray's own options under `serve run`; leave it out, or use attnzoo serve")
    return build(build_serve_config(absolute_paths(values)))


def __getattr__(name: str) -> serve.Application:
    """The attribute `application`, for `serve build`, which cannot pass arguments to `app`. Its settings come from the
    file that `CONFIG_VARIABLE` names; the variable must also be set where the result is deployed. Raises ValueError."""
    if name != "application":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    path = os.environ.get(CONFIG_VARIABLE)
    if not path:
        raise ValueError(f"set {CONFIG_VARIABLE} to a YAML file of settings, such as configs/serve/smollm2.yaml")
    return app({key: value for key, value in read_config_file(Path(path)).items() if key not in RUN_ONLY})


def start(
    config: ServeConfig,
    connected: Callable[[], None],
    cancelled: Callable[[], bool] = lambda: False,
    lost: Callable[[str], None] = lambda name: None,
) -> str:
    """Starts a local Ray (or joins `config.cluster`), deploys, waits until the server answers; returns its base URL.

    Call `prepare_environment` before importing this module: it turns on Ray's token authentication. connected: called
    after Ray has installed its signal handlers and before clients can connect, so that the caller can install its own.
    cancelled: waiting stops once it returns True. lost: called in a thread, until `stop`, with the name of the process
    that ended if a local Ray ends by itself. Raises ValueError for a wrong configuration, RuntimeError if the
    deployment fails.
    """
    application = build(with_threads(config))
    port = free_port(config.host, config.port)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    with sigterm_held_back():
        # Ray puts the current directory first on its workers' path; a user's serve.py there would hide this package.
        with contextlib.chdir(directory()):
            _connect(config)
        connected()
    if config.cluster is None:
        node: Any = ray._private.worker._global_node
        _local.append(LocalRay(node, lost))
    try:
        serve.start(proxy_location="HeadOnly", http_options=HTTPOptions(host=config.host, port=port))
        serve.run_many([serve.RunTarget(application, APP_NAME)], wait_for_applications_running=False)
        wait_until_running(cancelled)
    except RayError as error:
        raise RuntimeError(f"Ray's own processes ended while the model was loading ({type(error).__name__})") from error
    return f"http://{reachable(config.host)}:{port}"


def _connect(config: ServeConfig) -> None:
    """Starts a local Ray, or joins the cluster of the configuration. Raises RuntimeError if Ray does not start."""
    if config.cluster is not None:
        ray.init(address=config.cluster, log_to_driver=False)
        return
    os.environ.pop("RAY_ADDRESS", None)  # it may name another cluster
    os.environ[VARIABLE] = config.front_limits.to_json()
    # Ray prints errors of its processes with pages of logs on stdout; `Watch` and `LocalRay` report them in one line.
    ray._private.worker.listen_error_messages = lambda *_: None
    try:
        ray.init(
            address="local",
            num_cpus=config.num_cpus,
            include_dashboard=False,
            _node_ip_address="127.0.0.1",
            log_to_driver=False,
            logging_level=logging.WARNING,
        )
    except Exception as error:  # Ray has no class of its own for it
        reason = str(error).partition(". ")[0]
        raise RuntimeError(f"Ray did not start: {reason}; a busy machine is too slow for it, so try again") from error


def wait_until_running(cancelled: Callable[[], bool]) -> None:
    """Waits until the replica runs. Raises RuntimeError with the constructor's error: after the first attempt for a
    ValueError, which another attempt cannot change, else when Ray gives up."""
    while not cancelled():
        found = serve.status().applications.get(APP_NAME)
        if found is not None:
            if found.status == ApplicationStatus.RUNNING:
                return
            problems = [status.message for status in found.deployments.values() if status.message]
            why = explain_failure(problems[0] if problems else found.message)
            if found.status in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY):
                raise RuntimeError(why)
            if problems and why.startswith("ValueError: "):
                raise RuntimeError(why.removeprefix("ValueError: "))
        time.sleep(0.1)


def explain_failure(message: str) -> str:
    """The exception that ended the constructor, taken from Ray's message about a deployment; else the message."""
    _, found, trace = message.rpartition("Traceback (most recent call last):\n")
    if found:
        # Frames are indented; the exception follows them and may have several lines.
        exception = re.search(r"^\S.*", trace, re.MULTILINE | re.DOTALL)
        if exception is not None:
            return exception[0].strip()
    if "ActorDiedError" in message or "died" in message:
        return (
            "the model's process ended while it was starting, without an exception: killed from outside, for its "
            f"memory perhaps, or by a crash in native code. Ray says: {message.strip()}"
        )
    return message.strip() or "Ray gives no reason; see the logs in /tmp/ray/session_latest/logs/serve"


def replica_state() -> str:
    """Ray's status of the replica in one line. Raises Ray's errors if Ray itself has ended."""
    found = serve.status().applications.get(APP_NAME)
    if found is None:
        return "Ray knows no application of this name any more"
    lines = []
    for name, status in found.deployments.items():
        states = ", ".join(f"{count} {state.lower()}" for state, count in status.replica_states.items())
        lines.append(
            f"{name}: {states or 'no replica'}" + (f"; {explain_failure(status.message)}" if status.message else "")
        )
    return " | ".join(lines) or found.status.lower()


def drain(timeout_s: float) -> bool:
    """Asks the replica to refuse new requests and finish running ones; False if it could not within `timeout_s`."""
    handle: DeploymentHandle = serve.get_app_handle(APP_NAME)
    try:
        return bool(handle.drain.remote().result(timeout_s=timeout_s + 5.0))
    except Exception:
        return False


def stop(config: ServeConfig) -> None:
    """Ends the application, and Ray if `start` has started it; other applications of a cluster stay."""
    if not ray.is_initialized():
        return
    if config.cluster is not None:
        serve.delete(APP_NAME)
    if _local:
        _local.pop().stop(ray.shutdown)
    else:
        ray.shutdown()
