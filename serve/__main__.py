"""`attnzoo serve` (in a checkout also `python -m serve`): serves a language model over an OpenAI-compatible API,
clinical models by /v1/predict, and a diffusion model by /v1/images."""

import argparse
import json
import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from attnzoo.apps import cache_directory
from attnzoo.cli import carry_out
from attnzoo.errors import complain
from serve.environment import prepare_environment

if TYPE_CHECKING:
    from serve.config import ServeConfig

NAME = "attnzoo serve"
EXAMPLES = """examples:
  attnzoo serve --checkpoint runs/demo
  attnzoo serve --checkpoint runs/demo --port 8001 max_num_seqs=4 max_model_len=512
  attnzoo serve --checkpoint runs/demo --config configs/serve/private.yaml
  attnzoo serve --config configs/serve/smollm2.yaml
  attnzoo serve --checkpoint runs/demo cache='{policy: d2o, keep_ratio: 0.2}'
  attnzoo serve runs/tscan-mortality
  attnzoo serve runs/demo clinical=runs/tscan-mortality
  attnzoo serve runs/tscan-mortality clinical=runs/ldam-sections
  attnzoo serve runs/phllm-pro
  attnzoo serve runs/diffusion-emoji

  curl http://127.0.0.1:8000/v1/completions -H 'content-type: application/json' \\
       -d '{"model": "demo", "prompt": "def ", "max_tokens": 32, "stream": true}'

In a checkout python -m serve is the same. Settings are written key=value and override the file; serve/config.py lists
them. Ctrl-C and SIGTERM stop the server after running requests have finished. Only this machine can connect unless
you set host=0.0.0.0; then set api_key_env too.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options and examples."""
    parser.description = (
        "Serve a language model over an OpenAI-compatible API, clinical models, or a diffusion model, on Ray Serve."
    )
    parser.epilog = EXAMPLES
    parser.add_argument(
        "model",
        nargs="?",
        metavar="CHECKPOINT",
        help="a directory that training or transformers has written, a .gguf file, or smollm2",
    )
    parser.add_argument("--checkpoint", help="the same by name; needed for a path with = in it")
    parser.add_argument("--port", type=int, help="port to listen on (default 8000)")
    parser.add_argument("--config", type=Path, help="a YAML file of settings, for example configs/serve/default.yaml")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings")


def read_config(options: argparse.Namespace) -> "ServeConfig":
    """The configuration from file, settings and options, checked by `check_checkpoint`. Raises ValueError."""
    from serve.config import absolute_paths, build_serve_config, parse_settings, read_config_file

    values = {} if options.config is None else read_config_file(options.config)
    words = list(options.settings)
    if options.model is not None and (options.checkpoint is not None or "=" in options.model):
        words.insert(0, options.model)  # a setting
    elif options.model is not None:
        options.checkpoint = options.model
    values |= parse_settings(words)
    values |= {key: value for key in ("checkpoint", "port") if (value := getattr(options, key)) is not None}
    if "checkpoint" not in values:
        raise ValueError("name what to serve: attnzoo serve CHECKPOINT, for example runs/demo or smollm2")
    config = build_serve_config(absolute_paths(values))
    check_checkpoint(config)
    return config


def check_checkpoint(config: "ServeConfig") -> None:
    """Checks the configuration before Ray starts. Raises ValueError if the checkpoint or the API key is missing, the
    port is taken, the device cannot be used, or sequences are to be longer than the model's."""
    from attnzoo.checkpoint import existing_checkpoint, load_tokenizer, open_checkpoint
    from attnzoo.tokenizer.chat import ChatTemplate
    from attnzoo.types import check_device
    from serve.clinical.loading import check_clinical
    from serve.drawing.loading import check_diffusion
    from serve.front.guard import read_api_key
    from serve.front.port import free_port
    from serve.kinds import is_language
    from serve.loading import check_served, max_model_len

    path = existing_checkpoint(config.checkpoint)
    check_clinical(config)
    check_diffusion(config)
    if is_language(config.checkpoint):
        max_model_len(config, open_checkpoint(path).config.max_positions)
        ChatTemplate.of(load_tokenizer(path))
        check_served(config)
    read_api_key(config.api_key_env)
    if config.cluster is None:  # a cluster's machine may differ from this one
        free_port(config.host, config.port)
        check_device(config.device)


def warnings_of(config: "ServeConfig") -> Iterator[str]:
    """What should be known before the server starts, a line each."""
    from serve.front.hosts import is_loopback

    if not is_loopback(config.host) and config.api_key_env is None:
        yield (
            f"host={config.host} without api_key_env: everyone who can reach this machine can use the server; set "
            "api_key_env, or host=127.0.0.1 for this machine alone"
        )


def example(url: str, name: str, chat: bool) -> str:
    """A curl command that sends the server a request."""
    content: dict[str, object]
    if chat:
        path, content = "chat/completions", {"messages": [{"role": "user", "content": "Hello"}]}
    else:
        path, content = "completions", {"prompt": "Once", "max_tokens": 32}
    body = json.dumps({"model": name, **content})
    return f"curl {url}/v1/{path} -H 'content-type: application/json' -d {shlex.quote(body)}"


def greet(config: "ServeConfig", url: str) -> None:
    """Prints what is served and how to ask for it."""
    from attnzoo.checkpoint import find_checkpoint, load_tokenizer, open_checkpoint
    from serve.clinical.describe import example_of
    from serve.clinical.loading import clinical_sources, load_model
    from serve.drawing.loading import diffusion_source
    from serve.kinds import is_language
    from serve.loading import sources

    clinical, drawing = clinical_sources(config), diffusion_source(config)
    others = [name for _, name in (*clinical, *filter(None, (drawing,)))]
    names = dict.fromkeys((config.served_name, *others))
    print(f"serving {' and '.join(map(repr, names))} on {url}", flush=True)
    path = find_checkpoint(config.checkpoint)
    if is_language(config.checkpoint):
        chat = load_tokenizer(path).chat_template is not None or sources(config).pictures is not None
        print(f"  {example(url, config.served_name, chat)}", flush=True)
        for slow in open_checkpoint(path).config.slow_streaming():
            print(f"note: {slow}", file=sys.stderr, flush=True)
    for source, name in clinical:
        body = json.dumps(example_of(load_model(source, name, config.max_patients)))
        print(f"  curl {url}/v1/predict -H 'content-type: application/json' -d {shlex.quote(body)}", flush=True)
        print(f"  for research only; what the model takes: {url}/v1/models/{name}", flush=True)
    if drawing is not None:
        body = json.dumps({"model": drawing[1], "prompt": "an apple"})
        print(
            f"  curl {url}/v1/images/generations -H 'content-type: application/json' -d {shlex.quote(body)}", flush=True
        )
        print(f"  in a browser: {url}/vision", flush=True)


def end_on_signals(ended: threading.Event) -> None:
    """Makes SIGINT and SIGTERM set `ended`."""
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda *_: ended.set())


def end_without_ray(name: str) -> None:
    """Ends this process from any thread: after Ray's process `name` has ended, calls to Ray would not return."""
    os._exit(complain(NAME, f"Ray's process {name} has ended, and the server with it; start it again", 1))


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m serve`; returns the exit status."""
    return carry_out(NAME, add_arguments, run, sys.argv[1:] if argv is None else argv)


def run(options: argparse.Namespace) -> int:
    """Serves until SIGINT or SIGTERM; returns the exit status. Raises ValueError for wrong usage."""
    config = read_config(options)
    prepare_environment(cache_directory())
    # These imports are slow, and Ray reads the environment when it is imported: so only now.
    from serve import deployment
    from serve.watch import EVERY_S, Watch

    ended = threading.Event()
    for line in warnings_of(config):
        print(f"warning: {line}", file=sys.stderr)
    print(f"starting Ray and loading {config.checkpoint} ...", file=sys.stderr)
    try:
        url = deployment.start(config, lambda: end_on_signals(ended), ended.is_set, end_without_ray)
    except (ValueError, RuntimeError, ConnectionError) as error:
        status = complain(NAME, str(error), 1)
        deployment.stop(config)
        return status
    except KeyboardInterrupt:
        deployment.stop(config)
        return 130
    if ended.is_set():
        deployment.stop(config)
        return 0
    greet(config, url)
    watch = Watch(url, deployment.replica_state, lambda line: print(line, file=sys.stderr, flush=True))
    while not ended.wait(EVERY_S):
        if not watch.look():
            status = complain(NAME, "Ray has ended and does not come back; start again", 1)
            deployment.stop(config)
            return status
    print(f"finishing running requests, for at most {config.drain_timeout_s:g} s ...", file=sys.stderr)
    if not deployment.drain(config.drain_timeout_s):
        print(f"some requests did not end within drain_timeout_s={config.drain_timeout_s}", file=sys.stderr)
    deployment.stop(config)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
