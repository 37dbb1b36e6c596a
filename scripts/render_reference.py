"""Writes docs/reference: configuration.md from the configuration classes, commands.md from --help, and data-formats.md
from the readers of clinical data.

    python scripts/render_reference.py            # rewrites the pages
    python scripts/render_reference.py --check    # exit status 1 if a page is out of date

A key's meaning is its comment in configs/base.yaml, else the text after `key: ` in the docstring of its class.
"""

import argparse
import contextlib
import dataclasses
import importlib
import inspect
import io
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, get_type_hints

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from attnzoo.attention import ATTENTION
from attnzoo.clinical.formats import FORMATS
from attnzoo.kvcache import CACHES
from attnzoo.models import (
    DecoderConfig,
    DiffusionConfig,
    EhrConfig,
    LdamConfig,
    ProjectorConfig,
    SensorConfig,
    VisionConfig,
)
from attnzoo.vision import SceneOptions
from attnzoo.vision.turns import TurnFormat
from scripts import render_formats
from serve.config import EngineConfig, ServeConfig
from train.config import Config
from train.data import DataConfig
from train.data.captioned import SCENES, CaptionedOptions
from train.tasks import diffusion, ldam
from train.tasks.clinical import DERIVED, ClinicalOptions
from train.tasks.picture_options import PictureModel, QuestionOptions
from train.tasks.sensors import FROM_DATA, LanguageModelOptions, SensorOptions
from train.tokenizer import TokenizerConfig

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = ROOT / "docs" / "reference"
OWNERS = {"model": DecoderConfig, "data": DataConfig, "tokenizer": TokenizerConfig}
"""Sections of a training configuration whose keys another class defines."""
LINE = re.compile(r"( *)(\w+):(?: ([^#]*?))?(?: *# (.*))?")
KNOWN = {
    "num_heads": "number of attention heads",
    "num_kv_heads": "number of key and value heads; None: num_heads",
    "head_dim": "channels of a head; None: model_dim / num_heads",
    "position": "kind of position encoding",
    "rope_theta": "base of the rotary frequencies",
    "qkv_bias": "whether the query, key and value layers have a bias",
    "output_bias": "whether the output layer has a bias",
    "qk_norm": "apply an RMSNorm to every head of q and k",
    "conv_width": "width of the convolution over time, including the current token",
    "conv_bias": "whether the convolution has a bias",
    "conv_init": "initial values of the convolution",
    "conv_share_heads": "all heads share one kernel per channel",
    "model_dim": "size of a token's vector",
    "mlp_dim": "hidden width of the MLPs",
    "num_layers": "number of blocks of attention and MLP",
    "norm_eps": "epsilon of the norms",
    "mlp_bias": "whether the MLP's linear layers have a bias",
    "tie_embeddings": "use the embedding as the output matrix",
    "init_std": "standard deviation of initial weights",
    "seed": "seed of random numbers; equal seeds give equal results",
    "activation_checkpointing": "drop activations, and compute them again in the backward pass",
    "dropout": "dropout probability of the adapters' inputs",
    "prompts": "beginnings of the samples",
    "max_new_tokens": "most new tokens of a sample",
    "temperature": "temperature of a sample",
    "top_p": "nucleus probability of a sample",
    "tensorboard": "write TensorBoard event files beside metrics.jsonl",
    "step": "one optimizer step",
    "device": "cpu, cuda or cuda:1",
    "channel_ratio": "fraction of every key's channels that is kept, in (0, 1]",
    "value_channel_ratio": "fraction of every value's channels that is kept, in (0, 1]",
    "window": "number of the newest tokens whose keys are not pruned",
    "score": "how channels are scored",
    "repack_every": "number of tokens beyond the window after which they are pruned; None: never",
    "prefill": '"oneshot", or "stream" to compress after every chunk of the prompt',
}
"""Meanings of keys that neither base.yaml nor a docstring explains."""
COMMANDS = [
    ("attnzoo", "attnzoo.cli"),
    ("train/main.py", "train.main"),
    ("python -m train.sweep", "train.sweep"),
    ("python -m scripts.demo", "scripts.demo"),
]
"""Title and module of each command; the module's `main` prints --help."""


def base_comments() -> dict[str, tuple[str, str]]:
    """(value, comment) of every dotted key in configs/base.yaml."""
    found, path = {}, [""]
    for line in (ROOT / "configs" / "base.yaml").read_text(encoding="utf-8").splitlines():
        match = LINE.fullmatch(line)
        if match:
            indent, key, value, comment = match.groups()
            path = [*path[: len(indent) // 2], key]
            found[".".join(path)] = ((value or "").strip(), comment or "")
    return found


def docstring(cls: type) -> str:
    """The class's docstring in one line; empty for a dataclass without one, whose `__doc__` is its signature."""
    own = cls.__dict__.get("__doc__") or ""
    return "" if own.startswith(f"{cls.__name__}(") else re.sub(r"\s+", " ", inspect.cleandoc(own))


def meanings(cls: type) -> dict[str, str]:
    """The meaning of each key in the docstrings of the class and its bases; "" has the text before the first key."""
    known = "|".join(field.name for field in dataclasses.fields(cls))
    start = re.compile(rf"(?:^|(?<=[.;] ))((?:`?(?:{known})`?(?:, )?)+): ")
    found: dict[str, str] = {}
    for each in cls.__mro__:
        text = docstring(each)
        pieces = start.split(text)
        found.setdefault("", pieces[0].strip())
        for keys, meaning in zip(pieces[1::2], pieces[2::2], strict=True):
            names = keys.replace("`", "").split(", ")
            together = f"{', '.join(names)}: " if len(names) > 1 else ""
            for key in names:
                found.setdefault(key, together + meaning.strip().rstrip(".;"))
    return found


def shown(value: str) -> str:
    """A value or type as code; bars are escaped for Markdown tables."""
    return f"`{value}`".replace("|", "\\|") if value else ""


def escaped(text: str) -> str:
    """Prose for a table cell; bars and angle brackets are escaped."""
    parts = text.split("`")
    parts[::2] = [part.replace("<", "&lt;") for part in parts[::2]]
    return "`".join(parts).replace("|", "\\|")


def type_name(kind: Any) -> str:
    """A type as users write it, for example int, str | None, "a" | "b"."""
    text = kind.__name__ if isinstance(kind, type) and "[" not in str(kind) else str(kind)
    text = re.sub(r"\b(?:typing|collections\.abc)\.", "", text)
    text = re.sub(r"Optional\[(.*)\]", r"\1 | None", text)
    text = re.sub(r"Literal\[([^\]]*)\]", lambda m: m[1].replace("'", '"').replace(", ", " | "), text)
    return text.replace("NoneType", "None")


def default(field: "dataclasses.Field[Any]") -> str:
    """A field's default as Python code; "required" if it has none."""
    if field.default_factory is not dataclasses.MISSING:
        return repr(field.default_factory())
    return "required" if field.default is dataclasses.MISSING else repr(field.default)


def table(cls: type, section: str | None = None, skip: Iterable[str] = ()) -> str:
    """A table of a class's keys. section: its name in a training configuration, whose tables show base.yaml's
    values."""
    base, said, kinds = base_comments(), meanings(cls), get_type_hints(cls)
    columns = ["key", "type", "default", *([] if section is None else ["in `base.yaml`"]), "meaning"]
    lines = [columns, ["---"] * len(columns)]
    for field in dataclasses.fields(cls):
        if field.name in skip:
            continue
        name = f"{section}.{field.name}" if section else field.name
        value, comment = base.get(name, ("", "")) if section is not None else ("", "")
        meaning = escaped(comment or said.get(field.name) or KNOWN.get(field.name, ""))
        given = [] if section is None else [shown(value)]
        lines.append([shown(field.name), shown(type_name(kinds[field.name])), shown(default(field)), *given, meaning])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def training() -> Iterator[str]:
    """Yields the page's parts about a training configuration."""
    sections: dict[str, type] = {}
    for field in dataclasses.fields(Config):
        if isinstance(field.type, type) and dataclasses.is_dataclass(field.type):
            sections[field.name] = field.type
    yield "## Training\n\n`configs/base.yaml` holds every key; other files say `base: base.yaml` and what differs. "
    yield "On the command line a key is written with its section: `train.steps=200`.\n\n### The run\n\n"
    yield table(Config, "", skip=[*sections, *OWNERS])
    for name, cls in {**OWNERS, **sections}.items():
        intro = meanings(cls)[""]
        skipped = ["vocab_size"] if name == "model" else []
        yield f"\n### {name}\n\n{escaped(intro)}{2 * chr(10) if intro else ''}{table(cls, name, skipped)}"
    yield "\n### Clinical models\n\nWith `task.kind: clinical` the sections above hold other keys. `data.format` is "
    yield f"one of {', '.join(f'`{name}`' for name in FORMATS)}; `data.path` is the place of the data set in its "
    yield "original format, and all other keys of `data` are options of that format "
    yield "([data formats](data-formats.md)). There is no `tokenizer`.\n\n"
    yield f"Keys of `task`:\n\n{table(ClinicalOptions)}\nKeys of `model`:\n\n{table(EhrConfig, skip=DERIVED)}"
    yield "\nWith `task.kind: ldam` the model reads texts, and series where there are any.\n\n"
    yield f"Keys of `task`:\n\n{table(ldam.LdamOptions)}\nKeys of `model`:\n\n{table(LdamConfig, skip=ldam.DERIVED)}"
    yield "\n### Sensor adapters\n\nWith `task.kind: sensor-lm` an adapter is trained in front of a frozen language "
    yield f"model (`data` as above).\n\nKeys of `task`:\n\n{table(SensorOptions)}\nKeys of `model`:\n\n"
    yield table(LanguageModelOptions) + "".join(table(SensorConfig, skip=FROM_DATA).splitlines(keepends=True)[2:])
    yield "\n### Diffusion\n\nWith `task.kind: diffusion` pictures are drawn from captions. `data.source` is `scenes`; "
    own = ", ".join(f"`{key}: {json.dumps(value)}`" for key, value in SCENES.items())
    yield f"scenes have other defaults here: {own}.\n\nKeys of `data`:\n\n{table(SceneOptions)}"
    yield "".join(table(CaptionedOptions).splitlines(keepends=True)[2:])
    yield f"\nKeys of `model`:\n\n{table(DiffusionConfig, skip=diffusion.FROM_DATA)}"
    yield "\n### Pictures\n\nWith `task.kind: pictures` a language model reads pictures. `data.source` is `scenes`; "
    yield "the other keys of `data` say what is in them. `model.decoder` has the keys of `model` above.\n\n"
    yield f"Keys of `task`:\n\n{table(QuestionOptions)}\nKeys of `task.texts`:\n\n{table(TurnFormat)}\n"
    yield f"Keys of `data`:\n\n{table(SceneOptions)}\nKeys of `model`:\n\n{table(PictureModel)}\n"
    yield f"Keys of `model.vision`:\n\n{table(VisionConfig)}\nKeys of `model.projector`:\n\n{table(ProjectorConfig)}"


def configuration() -> str:
    """The page of configuration keys."""
    page = (
        "# Configuration keys\n\nThis page is written by `python scripts/render_reference.py` from the classes in the "
    )
    page += "code.\n\n" + "".join(training())
    page += "\n## Serving\n\nKeys of a serving configuration, and `key=value` after `attnzoo serve`.\n"
    page += "\n### The engine\n\n"
    page += table(EngineConfig)
    page += "\n### The server around it\n\n" + table(
        ServeConfig, skip=[f.name for f in dataclasses.fields(EngineConfig)]
    )
    page += "\n## Attention variants\n\nOptions of `attnzoo.attention(name, ...)` and of `model.attention`.\n"
    for kind in ATTENTION:
        cls = ATTENTION.get(kind)
        intro = meanings(cls.Config)[""]
        page += f"\n### {kind}\n\n{escaped(docstring(cls))} Source: {cls.source}. {escaped(intro)}".rstrip() + "\n\n"
        page += table(cls.Config, skip=["model_dim"])
    page += "\n## Caches\n\nOptions of `cache=` in Python, `cache` in requests, and `cache` in configurations.\n"
    for kind in CACHES:
        page += (
            f"\n### {kind}\n\n{table(CACHES.get(kind).Config)}" if dataclasses.fields(CACHES.get(kind).Config) else ""
        )
    return page


def help_of(module: str, *words: str) -> str:
    """The text that the module's `main` prints for --help."""
    printed, before = io.StringIO(), sys.argv
    sys.argv = ["train/main.py" if module == "train.main" else f"python -m {module}", *words, "--help"]
    try:
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            importlib.import_module(module).main([*words, "--help"]) if words else importlib.import_module(
                module
            ).main()
    finally:
        sys.argv = before
    return printed.getvalue()


def subcommands(text: str) -> list[str]:
    """The commands in a help text, in its order."""
    listed = re.search(r"^commands:\n((?:  .*\n)+)", text, re.MULTILINE)
    if listed:
        return re.findall(r"^  ([\w-]+) ", listed[1], re.MULTILINE)
    choices = re.search(r"\{([\w,-]+)\} \.\.\.", text)
    return choices[1].split(",") if choices else []


def commands() -> str:
    """The page of commands."""
    os.environ |= {"COLUMNS": "110", "NO_COLOR": "1"}
    page = "# Commands\n\nThis page is written by `python scripts/render_reference.py` from what `--help` prints.\n"
    for title, module in COMMANDS:
        page += command(title, module)
    return page


def command(title: str, module: str, *words: str) -> str:
    """The help of a command and of its subcommands."""
    text = help_of(module, *words)
    page = f"\n##{'#' * len(words)} {' '.join([title, *words])}\n\n```text\n{text.rstrip()}\n```\n"
    return page + "".join(command(title, module, *words, word) for word in subcommands(text))


PAGES = {"configuration.md": configuration, "commands.md": commands, "data-formats.md": render_formats.page}


def main() -> int:
    """Writes or checks the pages; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="check only, write nothing")
    check, stale = parser.parse_args().check, 0
    for name, page in PAGES.items():
        path, text = REFERENCE / name, page()
        if not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        elif not path.is_file() or path.read_text(encoding="utf-8") != text:
            stale = 1
            print(f"docs/reference/{name} is not current; run python scripts/render_reference.py", file=sys.stderr)
    return stale


if __name__ == "__main__":
    sys.exit(main())
