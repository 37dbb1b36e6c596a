"""Checks commands of the documents without running them: programs, options, files and keys have to be there."""

import json
import re
import shlex
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from scripts.render_reference import help_of, subcommands
from serve.config import SERVE_FIELDS, build_serve_config, parse_settings, read_config_file
from train.config_reader import load_config

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("attnzoo/", "configs/", "docs/", "scripts/", "serve/", "tests/", "train/")
TRAINING = {"--num_accelerators", "--num_gpus", "--num_nodes", "--hostfile"}
"""Options of the deepspeed command that the documents use."""
ROUTES = (
    *("/v1/completions", "/v1/chat/completions", "/v1/predict", "/v1/images/generations", "/v1/images/compose"),
    *("/v1/models", "/health", "/metrics"),
)


def check(line: str) -> None:
    """Raises ValueError that says what of a command is wrong."""
    words = shlex.split(line, comments=True)
    while words and re.fullmatch(r"\w+=.*", words[0], re.DOTALL):
        words = words[1:]
    if not words:
        return
    for word in words:
        if word.startswith(ROOMS) and "=" not in word and not (ROOT / word.split(":")[0]).exists():
            raise ValueError(f"{line}: there is no {word}")
    program = Path(words[0]).name or words[0]
    if program not in PROGRAMS:
        raise ValueError(f"{line}: nothing here checks the program {words[0]!r}; add it to tests/docs/commands.py")
    PROGRAMS[program](words[1:])


@cache
def _help(module: str, *words: str) -> str:
    return help_of(module, *words)


def _options(words: list[str], text: str) -> None:
    known = set(re.findall(r"(?<![\w-])--?[\w-]+", text))
    for word in words:
        if word.startswith("-") and word != "-" and word.split("=")[0] not in known:
            raise ValueError(f"{word} is no option; known: {', '.join(sorted(known))}")


def _attnzoo(words: list[str]) -> None:
    known = subcommands(_help("attnzoo.cli"))
    if not words or words[0] not in known:
        raise ValueError(f"attnzoo {' '.join(words)}: known are {', '.join(known)}")
    depth = 2 if words[0] == "bench" else 1
    _options(words[depth:], _help("attnzoo.cli", *words[:depth]))
    if words[0] == "serve":
        _settings(words[1:])
    if words[0] == "train":
        _overrides(words[1:])


def _serve(words: list[str]) -> None:
    _options(words, _help("serve.__main__"))
    _settings(words)


def _settings(words: list[str]) -> None:
    """Of a server, as its command reads them."""
    rest = iter(words)
    settings: dict[str, object] = {"checkpoint": "smollm2"}
    for word in rest:
        if word == "--config":
            settings |= read_config_file(ROOT / next(rest))
        elif word.startswith("--"):
            settings[word.removeprefix("--")] = json.loads(next(rest)) if word == "--port" else next(rest)
        elif word == words[0] and "=" not in word:
            settings["checkpoint"] = word
        else:
            settings |= parse_settings([word])
    build_serve_config(settings)


def _train(words: list[str]) -> None:
    _options(words, _help("train.main"))
    _overrides(words)


def _overrides(words: list[str]) -> None:
    """Of a training run, with its configuration."""
    # The reader's own variant exists on the reader's machine only.
    overrides = [word.replace("attention=mine", "attention=mha") for word in words if "=" in word]
    load_config(words[words.index("--config") + 1], overrides)


def _python(words: list[str]) -> None:
    if words[0] == "train/main.py":
        return _train(words[1:])
    if words[:2] == ["-m", "attnzoo"]:
        return _attnzoo(words[2:])
    if words[:2] == ["-m", "serve"]:
        return _serve(words[2:])
    if words[0] == "-c":
        compile(words[1], "-c", "exec")
        return None
    module = words[1] if words[0] == "-m" else words[0].removesuffix(".py").replace("/", ".")
    arguments = words[2:] if words[0] == "-m" else words[1:]
    if not (ROOT / module.replace(".", "/")).with_suffix(".py").is_file():
        raise ValueError(f"there is no module {module}")
    if arguments:
        _options(arguments, _help(module))
    return None


def _deepspeed(words: list[str]) -> None:
    at = words.index("train/main.py")
    for word in words[:at]:
        if word.startswith("--") and word not in TRAINING:
            raise ValueError(f"{word} is not among {', '.join(sorted(TRAINING))}")
    _train(words[at + 1 :])


def _make(words: list[str]) -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    for word in words:
        name, equals, value = word.partition("=")
        if equals and f"$({name})" not in text and f"$(if $({name})" not in text:
            raise ValueError(f"make {word}: the Makefile does not read {name}")
        if name == "MODEL" and not (ROOT / "configs" / "serve" / f"{value}.yaml").is_file():
            raise ValueError(f"make {word}: there is no such model under configs/serve")
        if not equals and not re.search(rf"^{word}:", text, re.MULTILINE):
            raise ValueError(f"make {word}: the Makefile has no such target")


def _ray(words: list[str]) -> None:
    if words[0] == "run":
        module, _, name = words[1].partition(":")
        if f"def {name}(" not in (ROOT / module.replace(".", "/")).with_suffix(".py").read_text(encoding="utf-8"):
            raise ValueError(f"there is no {words[1]}")
        build_serve_config(parse_settings(words[2:]))
    elif words[0] != "deploy":
        raise ValueError(f"serve {words[0]}: run or deploy")


def _curl(words: list[str]) -> None:
    address = re.sub(r"http://[\w.]+(:\d+)?", "", next(word for word in words if word.startswith("http://")))
    path, _, query = address.partition("?")
    if path not in ROUTES:
        raise ValueError(f"the server has no {path}")
    if path == "/v1/predict":
        return _predict(words, query)
    if path.startswith("/v1/images/") and "-d" in words:
        return _draw(words[words.index("-d") + 1].encode(), path)
    if "-d" in words:
        body = json.loads(words[words.index("-d") + 1])
        known = set(_fields(path))
        if not body.keys() <= known:
            raise ValueError(f"{path} has no {', '.join(sorted(body.keys() - known))}")
        if "chat" in path:
            _chat(body)
    return None


def _chat(body: dict[str, Any]) -> None:
    """Reads a conversation as the server does, sensor data and pictures in it too."""
    from serve.modalities.images import ImageUrl
    from serve.modalities.sensors import SensorData
    from serve.openai.errors import ApiError
    from serve.openai.protocol_chat import DataPart, parse_chat

    try:
        messages = parse_chat(json.dumps(body).encode()).conversation()
    except ApiError as error:
        raise ValueError(f"/v1/chat/completions: {error}") from None
    for part in (part for one in messages for part in one["content"]):
        if isinstance(part, DataPart):
            {"sensor_data": SensorData, "image_url": ImageUrl}[part.kind].model_validate(part.value)


def _predict(words: list[str], query: str) -> None:
    """Reads what is asked for as the server does."""
    from attnzoo.clinical.definitions import SECTIONS
    from serve.clinical.notes.protocol import parse_notes
    from serve.clinical.protocol import parse_bundle_options, parse_predict, read_values
    from serve.openai.errors import ApiError

    try:
        parse_bundle_options(
            [(name, value) for name, _, value in (one.partition("=") for one in query.split("&") if one)]
        )
        if "-d" in words:
            values = read_values(words[words.index("-d") + 1].encode())
            of_texts = any("text" in patient for patient in values.get("patients", []))
            parse_notes(values, tuple(SECTIONS)) if of_texts else parse_predict(values)
    except ApiError as error:
        raise ValueError(f"/v1/predict: {error}") from None


def _draw(body: bytes, path: str) -> None:
    """Reads what is asked for as the server does."""
    from serve.drawing.protocol import parse_compose, parse_image
    from serve.openai.errors import ApiError

    try:
        parse_compose(body) if path.endswith("/compose") else parse_image(body)
    except ApiError as error:
        raise ValueError(f"{path}: {error}") from None


def _fields(path: str) -> list[str]:
    from serve.openai.protocol import CompletionRequest
    from serve.openai.protocol_chat import ChatRequest

    return list((ChatRequest if "chat" in path else CompletionRequest).model_fields)


def _pip(words: list[str]) -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for word in words:
        extras = re.search(r"\[([\w,]+)\]", word)
        for extra in extras[1].split(",") if extras else ():
            if not re.search(rf"^{extra} = \[", text, re.MULTILINE):
                raise ValueError(f"pip install {word}: there is no extra {extra}")


def _anything(words: list[str]) -> None:
    """Programs of the system, with files of the tree or of the reader's."""


def _lm_eval(words: list[str]) -> None:
    """Tasks that are asked for are among those of the tests."""
    options = dict(zip(words[::2], words[1::2], strict=True))
    folder = ROOT / "tests/data/eval"
    known = re.findall(r"^task: (\w+)$", "\n".join(path.read_text("utf-8") for path in folder.glob("*.yaml")), re.M)
    for task in options["--tasks"].split(","):
        if task not in known:
            raise ValueError(f"lm_eval --tasks {task}: {folder.relative_to(ROOT)} has {', '.join(known)}")


PROGRAMS: dict[str, Callable[[list[str]], None]] = {
    "attnzoo": _attnzoo,
    "python": _python,
    "deepspeed": _deepspeed,
    "make": _make,
    "serve": _ray,
    "curl": _curl,
    "pip": _pip,
    "lm_eval": _lm_eval,
    **dict.fromkeys(("cp", "cd", "git", "pytest", "export", "env", "."), _anything),
}
assert "checkpoint" in SERVE_FIELDS
