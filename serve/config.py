"""Settings of the engine and of the server around it: one flat, strict mapping."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from attnzoo.apps import find_config
from attnzoo.checkpoint import PACKAGED, find_checkpoint
from attnzoo.settings import parse_words, parse_yaml, read_mapping
from attnzoo.types import CheckedConfig, build_config, parse_dtype
from serve.caches import CacheRules
from serve.front.limits import Limits, check_host_name

MAX_REQUESTS = 1_000_000
"""More requests at a time than this no setting may ask for; Ray counts them in 32 bits."""

MAX_THREADS = 1024
"""Where more cannot be had, torch ends the process without a word."""

CONTROL_TOKENS = ("template", "template_only", "everywhere")


@dataclass(frozen=True, kw_only=True)
class EngineConfig(CheckedConfig):
    """What the engine needs.

    checkpoint: a run or export directory of ours, a directory of transformers, a .gguf file, the name of a model that
    comes in a package ("smollm2"), or that of one in $ATTNZOO_HOME/models. max_num_seqs: sequences that run at the same
    time (slots of the state). max_model_len: prompt and completion together, in tokens; None takes the model's
    max_positions.
    max_batched_tokens: tokens that one step may send through the model. itl_target_ms: while any sequence decodes, a
    step reads as much of prompts as keeps it within about this time by what steps took so far, at least 32 tokens, so
    that the next token of a stream does not wait for other prompts; None: as much as max_batched_tokens leaves.
    max_queue: requests that may wait.
    dtype: None keeps the checkpoint's. check_weights: refuse a checkpoint with NaN or infinity in it. pack_weights: lay
    weights out for reading on a CPU (bfloat16 and float32), twice as fast for single tokens; None: where the machine
    can. compile_decode: decode steps through torch's compiler, faster on a CPU by a quarter and more, of the full cache
    where it may be used and of `cache`; needs a C++ compiler and 15 seconds to two minutes at the start. threads: CPU
    threads of torch, None leaves them as they are.
    step_timeout_s: a step that takes longer makes the engine unhealthy.
    control_tokens: whose text may hold control tokens such as <|im_end|>. "template": in a conversation what the chat
    template writes and nothing else, so that a message is text whatever it spells; prompts of /v1/completions are the
    model's raw input and may hold them. "template_only": they may not. "everywhere": messages may as well, as in
    transformers and vLLM.
    cache: how keys and values are kept unless a request says otherwise, {"policy": "d2o", "keep_ratio": 0.2}; None
    takes the model's own choice, else the full cache. cache_bounds: what requests may ask for, {policy: {option:
    [least, most]}} (`serve.caches.CacheRules`), options that are not named keeping their defaults; None: any policy
    that compresses, with options up to what the model can hold. max_caches: different choices that run at the same time
    besides the server's own, each a pass through the model; further ones wait. cache_mib: memory for compressed caches,
    prompts that are being read included; requests wait for room. By the policies' byte models, and by measured rows:
    what layers with budgets of their own pad in the newest row may come on top. None: for as many as run.
    """

    checkpoint: str
    max_num_seqs: int = 8
    max_model_len: int | None = None
    max_batched_tokens: int = 512
    itl_target_ms: float | None = 200.0
    max_queue: int = 64
    device: str = "cpu"
    dtype: str | None = None
    check_weights: bool = True
    pack_weights: bool | None = None
    compile_decode: bool = False
    threads: int | None = None
    step_timeout_s: float = 120.0
    control_tokens: str = "template"
    cache: dict | None = None
    cache_bounds: dict | None = None
    max_caches: int = 4
    cache_mib: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        CacheRules(self.cache, self.cache_bounds)
        for name in ("max_num_seqs", "max_batched_tokens", "max_model_len", "threads", "max_caches", "cache_mib"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if self.max_queue < 0:
            raise ValueError(f"max_queue={self.max_queue} must be at least 0")
        for name in ("max_num_seqs", "max_queue"):
            if getattr(self, name) > MAX_REQUESTS:
                raise ValueError(f"{name}={getattr(self, name)} must be at most {MAX_REQUESTS}")
        if self.threads is not None and self.threads > MAX_THREADS:
            raise ValueError(f"threads={self.threads} must be at most {MAX_THREADS}")
        if self.max_batched_tokens <= self.max_num_seqs:
            raise ValueError(
                f"max_batched_tokens={self.max_batched_tokens} must be larger than max_num_seqs={self.max_num_seqs}"
            )
        if self.control_tokens not in CONTROL_TOKENS:
            known = ", ".join(CONTROL_TOKENS)
            raise ValueError(f"control_tokens={self.control_tokens!r} is not known; choose one of {known}")
        if self.itl_target_ms is not None:
            _check_seconds(self, "itl_target_ms")
        _check_seconds(self, "step_timeout_s")
        if self.dtype is not None:
            parse_dtype(self.dtype)


@dataclass(frozen=True, kw_only=True)
class ServeConfig(EngineConfig):
    """The engine's settings and the server's.

    host, port: where HTTP listens; loopback unless you say otherwise. model_name: the name clients use; None takes
    the checkpoint's directory name (its parent's when that is "export"). api_key_env: name of an environment variable
    that holds the API key; None leaves the API open to whoever reaches the port. max_body_bytes: largest request body.
    stream_interval_ms: after one event of a stream, the next waits at least this long and then carries all new text;
    the first comes at once. Saves work where tokens come faster than anyone reads; 0 sends every token by itself.
    max_choices: completions (prompts times n) of one request, never more than run and wait together. num_cpus: CPUs
    that the local Ray may plan with.
    drain_timeout_s: how long running requests may take to end at shutdown. allowed_hosts: names that clients may call
    this server by, beside those of loopback ("api.example.com", "*.example.com", "*" for any); None: while host is on
    loopback no others, else addresses and this machine's name too. header_timeout_s, body_timeout_s: how long a client
    may take to send either. write_timeout_s: how long it may leave its answer unread. max_reading: requests whose body
    is on its way; with more, the one that has waited longest ends with 408. cluster: address of a running Ray cluster
    ("auto" finds it); None starts a local one.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    model_name: str | None = None
    api_key_env: str | None = None
    max_body_bytes: int = 1 << 20
    max_choices: int = 16
    stream_interval_ms: float = 0.0
    num_cpus: int = 2
    drain_timeout_s: float = 30.0
    cluster: str | None = None
    allowed_hosts: list | None = None
    header_timeout_s: float = 10.0
    body_timeout_s: float = 30.0
    write_timeout_s: float = 60.0
    max_reading: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.host.strip():
            raise ValueError(f"host={self.host!r} is empty; give 127.0.0.1, or 0.0.0.0 for all interfaces")
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port={self.port} must be between 0 (any free port) and 65535")
        for name in ("max_body_bytes", "max_choices", "num_cpus", "max_reading"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("drain_timeout_s", "stream_interval_ms"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be a number, and not negative")
        for name in ("header_timeout_s", "body_timeout_s", "write_timeout_s"):
            _check_seconds(self, name)
        for host in self.allowed_hosts or ():
            check_host_name(host)

    @property
    def front_limits(self) -> Limits:
        """What the front needs to know."""
        hosts = None if self.allowed_hosts is None else tuple(check_host_name(name) for name in self.allowed_hosts)
        same = ("host", "api_key_env", "max_body_bytes", "header_timeout_s", "body_timeout_s", "write_timeout_s")
        values = {name: getattr(self, name) for name in same}
        return Limits(allowed_hosts=hosts, max_reading=self.max_reading, **values)

    @property
    def served_name(self) -> str:
        """The model's name in the API."""
        if self.model_name:
            return self.model_name
        if self.checkpoint in PACKAGED:
            return self.checkpoint
        path = Path(self.checkpoint).resolve()
        name = path.name.removesuffix(".gguf")
        return path.parent.name if name == "export" and path.parent.name else name


def _check_seconds(config: EngineConfig, name: str) -> None:
    if not 0 < getattr(config, name) < math.inf:
        raise ValueError(f"{name}={getattr(config, name)} must be positive and finite")


SERVE_FIELDS = tuple(field.name for field in fields(ServeConfig))


TEXT_FIELDS = ("checkpoint", "model_name", "host", "device", "dtype", "api_key_env")
"""Settings that are names and paths: a number or a YAML bracket in them is text."""


def parse_settings(words: Iterable[str]) -> dict[str, Any]:
    """{"port": 8001} from ["port=8001"]. Raises ValueError for what is no key=value, or cannot be read."""
    hint = f"; known: {', '.join(SERVE_FIELDS)}"
    values = parse_words(words, "port=8001", as_text=TEXT_FIELDS, hint=hint)
    return {key: parse_value(key, value) if key in TEXT_FIELDS else value for key, value in values.items()}


def parse_value(key: str, text: Any) -> Any:
    """A setting's value given as text; what is not text stays as it is, as Ray gives it."""
    if not isinstance(text, str) or key in TEXT_FIELDS:
        return None if text in ("null", "none", "None") and key != "checkpoint" else text
    return parse_yaml(text, key)


def read_config_file(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; configs/ is where `attnzoo.apps` says. Raises ValueError that names the file."""
    return read_mapping(find_config(path))[0] or {}


def absolute(checkpoint: Any) -> Any:
    """A path that holds in every process; the name of a packaged model, and what is no text, as it is. Raises
    ValueError as `find_checkpoint`."""
    if not isinstance(checkpoint, str) or checkpoint in ("", *PACKAGED):
        return checkpoint
    return str(find_checkpoint(checkpoint))


def build_serve_config(values: Mapping[str, Any]) -> ServeConfig:
    """A `ServeConfig` from a mapping. Raises ValueError for unknown (nearest name given), missing or wrong values."""
    return build_config(ServeConfig, values, "serve")
