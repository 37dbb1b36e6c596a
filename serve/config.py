"""Settings of the engine and the server: one flat mapping, in which unknown keys are errors."""

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from attnzoo.apps import find_config
from attnzoo.attention.edits.plan import MAX_BYTES
from attnzoo.checkpoint import PACKAGED, existing_checkpoint, find_checkpoint
from attnzoo.clinical.trained_sensors import holds_sensors, named_language_model
from attnzoo.files import user_path
from attnzoo.settings import parse_words, parse_yaml, read_mapping
from attnzoo.types import CheckedConfig, build_config, parse_dtype
from attnzoo.vision import trained_pictures
from attnzoo.vision.turns import MOST_PICTURES
from serve.caches import CacheRules
from serve.front.limits import Limits, check_host_name
from serve.history import MOST_DRAFTED
from serve.prompt_dtype import check_prompt_dtype

MAX_REQUESTS = 1_000_000
"""Upper bound of max_num_seqs and max_queue; Ray counts requests in 32 bits."""

MAX_THREADS = 1024
"""Upper bound of threads; torch ends the process without a message if it cannot create them."""

ADAPTERS = {"sensors": "a sensor adapter", "pictures": "a model of pictures"}
"""What stands in front of a frozen language model, by the setting that names it."""
CONTROL_TOKENS = ("template", "template_only", "everywhere")
ATTENTION = ("off", "read", "edit")


@dataclass(frozen=True, kw_only=True)
class EngineConfig(CheckedConfig):
    """Settings of the engine.

    checkpoint: a run or export directory of training, a directory that transformers has written, a .gguf file, the
    name of a packaged model ("smollm2"), or the name of a model in $ATTNZOO_HOME/models; or the run or export directory
    of a sensor adapter, or of a model of pictures in front of a frozen language model, which name their language model.
    sensors: the run or export directory of a sensor adapter whose language model is `checkpoint`: messages may then
    hold sensor data. pictures: likewise of a model of pictures in front of `checkpoint`; a model that was trained with
    its own language model needs no setting. max_images: most pictures of a conversation. max_image_bytes: most bytes of
    a picture's file. max_image_pixels: most pixels of a picture, width times height. max_num_seqs: sequences that run
    at the same time. max_model_len: most tokens of prompt and completion together; None takes the model's
    max_positions.
    max_batched_tokens: most tokens that one step sends through the model. itl_target_ms: target time between two tokens
    of a stream, in milliseconds; while any sequence decodes, a step reads only so many prompt tokens (at least 32) as
    earlier steps' times allow; None: as many as max_batched_tokens allows. max_queue: requests that may wait.
    dtype: of the weights; None keeps the checkpoint's. check_weights: refuse a checkpoint with NaN or infinity.
    pack_weights: store bfloat16 and float32 weights in a layout that makes decoding on a CPU about twice as fast; None:
    if the machine supports it. prompt_dtype: in which the matrix products of prompts, in chunks of at least 32 tokens,
    are computed on a CPU with bfloat16 or float16 weights: "float32", which widens a weight for the time of a product
    (four bytes for each number of the largest one), or the weights' dtype; "auto" takes the faster one by a measurement
    of some hundredths of a second at the start, so that texts of two starts may differ by rounding.
    compile_decode: compile decode steps of the full cache (if it may be used) and of `cache` with torch's compiler; on
    a CPU a third faster with one sequence, a seventh with eight; needs a C++ compiler and 15 seconds to two minutes.
    threads: CPU threads of torch; None: as OMP_NUM_THREADS says, else under `attnzoo serve` one for each core, and on
    a cluster the one that Ray gives. step_timeout_s: a step that takes longer makes the engine unhealthy.
    control_tokens: where control tokens such as <|im_end|> may come from. "template": in chats only from the chat
    template, so that text in a message never becomes a control token; prompts of /v1/completions may contain them.
    "template_only": prompts may not contain them either. "everywhere": prompts and messages may, as in transformers and
    vLLM.
    cache: the default cache of requests, {"policy": "d2o", "keep_ratio": 0.2}; None takes the model's own, or the full
    cache if it has none. cache_bounds: what requests may choose, {policy: {option: [least, most]}}
    (`serve.caches.CacheRules`); None: any policy that compresses, with options up to what the model can hold.
    max_caches: number of different caches besides the default that may run at the same time (each needs its own pass
    through the model); requests for others wait. cache_mib: memory in MiB for the caches of all requests, and for
    prompts being read into compressed ones; requests wait for free memory. A full cache counts as the pages that its
    tokens fill, and 256 more tokens of its text; where sequences grow beyond the limit, the least urgent one that came
    last is set aside, and goes on later. Compressed caches count by the policies' byte models and by measured rows;
    padding of the newest row, where layers have different budgets, may exceed the limit. None: no limit.
    prefix_mib: memory in MiB for beginnings of prompts, which later prompts that begin alike copy in place of computing
    them, and for the states of sequences that were set aside; the text is the same, bit for bit. 0: nothing is kept,
    and what was set aside is computed anew. prefix_cell: tokens of the pieces that are kept and in which prompts are
    read, at most max_batched_tokens - max_num_seqs; larger ones compute a little faster, smaller ones match more.
    prompt_lookup: most tokens that are drafted for a greedy sequence in the full cache, by what followed the same
    tokens in its prompt and text; those that the model chooses itself are computed in one pass. For texts that repeat
    their prompts (corrected, quoted, code) and up to four sequences at a time; drafts that take longer than they save
    are left out. At most 16; 0: none. In bfloat16 the text may become another one by rounding.
    """

    checkpoint: str
    sensors: str | None = None
    pictures: str | None = None
    max_images: int = 1
    max_image_bytes: int = 1 << 20
    max_image_pixels: int = 1 << 24
    max_num_seqs: int = 8
    max_model_len: int | None = None
    max_batched_tokens: int = 512
    itl_target_ms: float | None = 200.0
    max_queue: int = 64
    device: str = "cpu"
    dtype: str | None = None
    check_weights: bool = True
    pack_weights: bool | None = None
    prompt_dtype: str = "auto"
    compile_decode: bool = False
    threads: int | None = None
    step_timeout_s: float = 120.0
    control_tokens: str = "template"
    cache: dict | None = None
    cache_bounds: dict | None = None
    max_caches: int = 4
    cache_mib: int | None = None
    prefix_mib: int = 256
    prefix_cell: int = 256
    prompt_lookup: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        CacheRules(self.cache, self.cache_bounds)
        for name in ("max_num_seqs", "max_batched_tokens", "max_model_len", "threads", "max_caches", "cache_mib"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        for name, most in (("max_images", MOST_PICTURES), ("max_image_bytes", 1 << 28), ("max_image_pixels", 1 << 26)):
            if not 1 <= getattr(self, name) <= most:
                raise ValueError(f"{name}={getattr(self, name)} must be between 1 and {most}")
        for name, least in (("prefix_mib", 0), ("prefix_cell", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        if not 0 <= self.prompt_lookup <= MOST_DRAFTED:
            raise ValueError(f"prompt_lookup={self.prompt_lookup} must be between 0 (off) and {MOST_DRAFTED}")
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
        check_prompt_dtype(self.prompt_dtype, self.dtype)


@dataclass(frozen=True, kw_only=True)
class ServeConfig(EngineConfig):
    """Settings of the engine and of the server.

    host, port: the address that HTTP listens on; loopback by default. model_name: the name that clients use; None takes
    the name of the checkpoint's directory (its parent's if that is "export"). api_key_env: name of an environment
    variable that holds the API key; None leaves the API open to everyone who can reach the port. max_body_bytes:
    largest request body.
    stream_interval_ms: shortest time between two events of a stream; the later one carries all new text. This saves
    work when tokens come faster than anyone reads; 0 sends every token at once. max_choices: most completions (prompts
    times n) of one request, never more than max_num_seqs + max_queue. priorities: whether requests may say how urgent
    they are, and take slots and memory of less urgent ones. num_cpus: CPUs of the local Ray.
    drain_timeout_s: seconds that running requests may take to finish at shutdown. allowed_hosts: host names of this
    server besides loopback's ("api.example.com", "*.example.com", "*" for any); None: no others if `host` is on
    loopback, else IP addresses and this machine's name too. header_timeout_s, body_timeout_s: seconds in which a client
    must send headers and body. write_timeout_s: seconds for which a client may leave its answer unread. max_reading:
    requests whose bodies may be arriving at the same time; one more ends the oldest of them with status 408. cluster:
    address of a running Ray cluster ("auto" finds it); None starts a local one.
    attention: what requests may do with attention by their field `attention`: "off" (nothing), "read", or "edit" (and
    read). Such a request runs by itself beside the batch, and counts as a cache of its own against max_caches.
    attention_max_bytes: most bytes that the reads of one request return, of all its choices. attention_total_bytes:
    most bytes of attention maps, those of running requests and those that wait for their download, together.
    attention_ttl_s: seconds for which a map can be downloaded.
    clinical: the run or export directory of a clinical model, which /v1/predict serves beside that of `checkpoint`, a
    language model or another clinical one. clinical_name: its name in the API; None takes that of its directory.
    max_patients: most patients of one prediction. max_explained: of one with explanations. max_predictions: predictions
    that may run or wait. predict_timeout_s: seconds after which a prediction is given up.
    diffusion: the run or export directory of a diffusion model, which /v1/images serves beside that of `checkpoint`.
    diffusion_name: its name in the API; None takes that of its directory. max_drawn: most pictures of one request.
    max_draw_steps: most steps of a picture. max_draw_pixels: most pixels of a picture that a request holds.
    max_drawings: requests for pictures that may run or wait. draw_timeout_s: seconds after which one is given up.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    model_name: str | None = None
    api_key_env: str | None = None
    max_body_bytes: int = 1 << 20
    max_choices: int = 16
    priorities: bool = False
    stream_interval_ms: float = 0.0
    num_cpus: int = 2
    drain_timeout_s: float = 30.0
    cluster: str | None = None
    allowed_hosts: list | None = None
    header_timeout_s: float = 10.0
    body_timeout_s: float = 30.0
    write_timeout_s: float = 60.0
    max_reading: int = 64
    attention: str = "off"
    attention_max_bytes: int = 16 << 20
    attention_total_bytes: int = 256 << 20
    attention_ttl_s: float = 300.0
    clinical: str | None = None
    clinical_name: str | None = None
    max_patients: int = 64
    max_explained: int = 8
    max_predictions: int = 16
    predict_timeout_s: float = 60.0
    diffusion: str | None = None
    diffusion_name: str | None = None
    max_drawn: int = 4
    max_draw_steps: int = 100
    max_draw_pixels: int = 1 << 20
    max_drawings: int = 16
    draw_timeout_s: float = 120.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.host.strip():
            raise ValueError(f"host={self.host!r} is empty; give 127.0.0.1, or 0.0.0.0 for all interfaces")
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port={self.port} must be between 0 (any free port) and 65535")
        if self.attention not in ATTENTION:
            known = ", ".join(ATTENTION)
            raise ValueError(f"attention={self.attention!r} is not known; choose one of {known}")
        if self.attention_max_bytes > MAX_BYTES:
            raise ValueError(f"attention_max_bytes={self.attention_max_bytes} must be at most {MAX_BYTES}")
        if self.attention_total_bytes < self.attention_max_bytes:
            raise ValueError(
                f"attention_total_bytes={self.attention_total_bytes} is less than one request may have, "
                f"attention_max_bytes={self.attention_max_bytes}; raise the one, or lower the other"
            )
        at_least_one = ("max_patients", "max_explained", "max_predictions", "max_reading", "attention_max_bytes")
        of_drawing = ("max_drawn", "max_draw_steps", "max_draw_pixels", "max_drawings")
        for name in ("max_body_bytes", "max_choices", "num_cpus", *at_least_one, *of_drawing):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("drain_timeout_s", "stream_interval_ms"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be a number, and not negative")
        of_work = ("attention_ttl_s", "predict_timeout_s", "draw_timeout_s")
        for name in ("header_timeout_s", "body_timeout_s", "write_timeout_s", *of_work):
            _check_seconds(self, name)
        for host in self.allowed_hosts or ():
            check_host_name(host)

    @property
    def front_limits(self) -> Limits:
        """The settings that `serve.front` needs."""
        hosts = None if self.allowed_hosts is None else tuple(check_host_name(name) for name in self.allowed_hosts)
        same = ("host", "api_key_env", "max_body_bytes", "header_timeout_s", "body_timeout_s", "write_timeout_s")
        values = {name: getattr(self, name) for name in same}
        return Limits(allowed_hosts=hosts, max_reading=self.max_reading, **values)

    @cached_property
    def served_name(self) -> str:
        """The model's name in the API. Every request asks for it, and links in a path are followed only once."""
        return self.model_name or name_of(self.checkpoint)


def name_of(checkpoint: str) -> str:
    """The name of a model after its checkpoint: its directory, for an export that of its run."""
    if checkpoint in PACKAGED:
        return checkpoint
    path = Path(checkpoint).resolve()
    name = path.name.removesuffix(".gguf")
    return path.parent.name if name == "export" and path.parent.name else name


def _check_seconds(config: EngineConfig, name: str) -> None:
    if not 0 < getattr(config, name) < math.inf:
        raise ValueError(f"{name}={getattr(config, name)} must be positive and finite")


SERVE_FIELDS = tuple(field.name for field in fields(ServeConfig))


TEXT_FIELDS = (
    "checkpoint",
    "sensors",
    "pictures",
    "model_name",
    "clinical",
    "clinical_name",
    "diffusion",
    "diffusion_name",
    "host",
    "device",
    "dtype",
    "api_key_env",
)
"""Settings that are names and paths; their values are not parsed as YAML."""


def parse_settings(words: Iterable[str]) -> dict[str, Any]:
    """Settings from `key=value` words: ["port=8001"] gives {"port": 8001}. Raises ValueError for a malformed word."""
    hint = f"; known: {', '.join(SERVE_FIELDS)}"
    values = parse_words(words, "port=8001", as_text=TEXT_FIELDS, hint=hint)
    return {key: parse_value(key, value) if key in TEXT_FIELDS else value for key, value in values.items()}


def parse_value(key: str, text: Any) -> Any:
    """A setting's value, parsed if it is text; other values, which Ray passes, are returned unchanged."""
    if not isinstance(text, str) or key in TEXT_FIELDS:
        return None if text in ("null", "none", "None") and key != "checkpoint" else text
    return parse_yaml(text, key)


def read_config_file(path: Path) -> dict[str, Any]:
    """The settings in a YAML file, which `attnzoo.apps.find_config` finds. Raises ValueError that names the file."""
    return read_mapping(find_config(path))[0] or {}


def absolute(checkpoint: Any) -> Any:
    """The checkpoint's absolute path, which is valid in every process. The name of a packaged model, a word that names
    nothing, or a value that is not text, is returned unchanged. Raises the ValueError of `find_checkpoint`."""
    if not isinstance(checkpoint, str) or checkpoint in ("", *PACKAGED):
        return checkpoint
    path = find_checkpoint(checkpoint)
    return str(path) if path.exists() or os.sep in checkpoint else checkpoint


def absolute_paths(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with `absolute` paths of models, an adapter apart from its language model. Raises ValueError."""
    found = dict(values)
    for name in ("clinical", "diffusion", *ADAPTERS):
        if isinstance(found.get(name), str):
            found[name] = str(user_path(found[name], name).absolute())
    if isinstance(found.get("checkpoint"), str):
        checkpoint, adapter = without_adapter(found["checkpoint"])
        if adapter and found.get(adapter[0]) is None:
            found[adapter[0]] = adapter[1]
            found["model_name"] = found.get("model_name") or name_of(adapter[1])
        elif adapter:
            checkpoint = adapter[1]  # which `serve.loading.sources` refuses
        found["checkpoint"] = absolute(checkpoint)
    return found


def without_adapter(checkpoint: str) -> tuple[str, tuple[str, str] | None]:
    """(checkpoint of the language model, (setting, directory) of the adapter) where `checkpoint` is an adapter in front
    of a frozen one, else (checkpoint, None). Raises ValueError for an adapter whose language model is not where it
    says."""
    if not checkpoint:
        return checkpoint, None
    path = trained_pictures.holds_pictures(user_path(checkpoint, "checkpoint"))
    named = None if path is None else trained_pictures.named_language_model(path)
    setting = "pictures"
    if path is None:
        path = find_checkpoint(checkpoint)
        named = named_language_model(path) if holds_sensors(path) else None
        setting = "sensors"
    if named is None:
        return checkpoint, None
    path = path.absolute()
    try:
        existing_checkpoint(named[0])
    except ValueError as error:
        raise ValueError(
            f"{path} is {ADAPTERS[setting]} in front of another model: {error}; or say where that model is: "
            f"checkpoint=... {setting}={path}"
        ) from None
    return named[0], (setting, str(path))


def build_serve_config(values: Mapping[str, Any]) -> ServeConfig:
    """A `ServeConfig` from a mapping. Raises ValueError for unknown (naming the nearest), missing and wrong values."""
    return build_config(ServeConfig, values, "serve")
