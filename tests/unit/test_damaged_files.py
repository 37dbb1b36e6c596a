"""Damaged and nonsensical files: a ValueError that names the file, or a model and a tokenizer that work."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from attnzoo.checkpoint import export_model, load_model, load_tokenizer, save_model
from tests.helpers import foreign_tokenizers, serving
from tests.helpers.gguf_files import Kind, random_model, write_metadata, write_model
from tests.helpers.open_weights import demo_model, reference

SEEDS = 30
HEAD = 3000
"""Bytes at the beginning of binary files, where their structure is."""
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 10**6, 2**31, 2**63, 10**30, 1.5, -0.0, 1e308, float("nan"), float("inf"), "", "x",
    "8", [], [1], {}, {"a": {"b": []}}, [None] * 3, "../x", "\0", "\ud800",
]  # fmt: skip


def flipped(content: bytes, draw: random.Random) -> bytes:
    """A cut, a few other bytes, a hole or an insertion; in half of the cases near the beginning."""
    data, reach = bytearray(content), len(content) if draw.random() < 0.5 else min(len(content), HEAD)
    place, kind = draw.randrange(reach), draw.randrange(6)
    if kind == 0:
        return bytes(data[:place])
    if kind == 1:
        data[place] ^= 1 << draw.randrange(8)
    elif kind == 2:
        data[place : place + 8] = draw.choice([b"\xff", b"\0"]) * 8
    elif kind == 3:
        data[place : place + 4] = draw.randbytes(4)
    elif kind == 4:
        del data[place : place + draw.randrange(1, 50)]
    else:
        data[place:place] = draw.randbytes(draw.randrange(1, 50))
    return bytes(data)


def changed(content: bytes, draw: random.Random) -> bytes:
    """JSON with one value gone or replaced by one that nobody expects."""
    tree = json.loads(content)
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            places.append((node, key))
            walk(node[key])

    walk(tree)
    node, key = draw.choice(places)
    if draw.random() < 0.2:
        del node[key]
    else:
        node[key] = draw.choice(VALUES)
    return json.dumps(tree).encode()


def use(tokenizer_at: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_at)
    for text in ("", "Hello  wörld 中 <s> \U0001f600\n\t"):
        ids = tokenizer.encode(text, bos=True, eos=True)
        assert isinstance(tokenizer.decode(ids), str)
        assert all(0 <= token < tokenizer.vocab_size for token in ids)
    for token in range(tokenizer.vocab_size):
        tokenizer.token_bytes(token), tokenizer.spelling(token)


def run(model_at: Path) -> None:
    model = load_model(model_at)
    with torch.no_grad():
        assert model(torch.tensor([[0, 1]])).shape == (1, 2, model.config.vocab_size)


def refusal(load: Callable[[Path], None], path: Path) -> str:
    """The message of a ValueError; empty where what was loaded works."""
    try:
        load(path)
    except ValueError as error:
        return str(error)
    return ""


def own(directory: Path) -> None:
    save_model(directory, serving.small_model("rcmha"), tokenizer=serving.tokenizer(), metadata={"steps": 3})


def exported(directory: Path) -> None:
    export_model(directory, demo_model(), tokenizer=serving.chat_tokenizer())


def sharded(directory: Path) -> None:
    reference("llama").save_pretrained(directory, max_shard_size="60KB")


def byte_level(directory: Path) -> None:
    foreign_tokenizers.write(directory, foreign_tokenizers.byte_level())
    (directory / "chat_template.jinja").write_text("{% for message in messages %}{{ message.content }}{% endfor %}")
    (directory / "tokenizer_config.json").write_text("{}")
    (directory / "special_tokens_map.json").write_text('{"bos_token": "!", "pad_token": {"content": "<pad>"}}')
    (directory / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')


def spaced(directory: Path) -> None:
    foreign_tokenizers.write(directory, foreign_tokenizers.spaced())


def foreign(directory: Path) -> None:
    foreign_tokenizers.train_sentencepiece(directory / "tokenizer")


def gguf_model(directory: Path) -> None:
    write_model(directory / "m.gguf", random_model(), Kind.Q8_0)


def gguf_scores(directory: Path) -> None:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"abc\u2581", "ab", "abc"]
    arrays = {"tokens": tokens, "token_type": [2, 3, 3, *[6] * 256, *[1] * 6], "scores": [0.0] * 259 + [-1.0] * 6}
    write_metadata(directory / "t.gguf", arrays=arrays, model="llama", bos_token_id=1, eos_token_id=2)


def gguf_merges(directory: Path) -> None:
    model = json.loads(foreign_tokenizers.byte_level().to_str())["model"]
    merges = [" ".join(merge) for merge in model["merges"]]
    arrays = {"tokens": list(model["vocab"]), "token_type": [1] * len(model["vocab"]), "merges": merges}
    write_metadata(
        directory / "t.gguf", arrays=arrays, model="gpt2", pre="gpt-2", eos_token_id=2, chat_template="{{ a }}"
    )


KINDS: dict[str, tuple[Callable[[Path], None], str, Callable[[Path], None]]] = {
    "own weights": (own, "model.safetensors", run),
    "own configuration": (own, "config.json", run),
    "own tokenizer": (own, "tokenizer.model", use),
    "exported configuration": (exported, "config.json", run),
    "exported tokenizer": (exported, "tokenizer.json", use),
    "exported tokenizer settings": (exported, "tokenizer_config.json", use),
    "index": (sharded, "model.safetensors.index.json", run),
    "shard": (sharded, "model-00001-of-00008.safetensors", run),
    "byte-level tokenizer": (byte_level, "tokenizer.json", use),
    "special tokens": (byte_level, "special_tokens_map.json", use),
    "chat template": (byte_level, "chat_template.jinja", use),
    "stop tokens": (byte_level, "generation_config.json", use),
    "spaced tokenizer": (spaced, "tokenizer.json", use),
    "foreign sentencepiece": (foreign, "tokenizer.model", use),
    "GGUF model": (gguf_model, "m.gguf", run),
    "GGUF tokenizer with scores": (gguf_scores, "t.gguf", use),
    "GGUF tokenizer with merges": (gguf_merges, "t.gguf", use),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Callable[[str], Path]:
    made: dict[Callable[[Path], None], Path] = {}

    def directory(kind: str) -> Path:
        make = KINDS[kind][0]
        if make not in made:
            made[make] = tmp_path_factory.mktemp("whole")
            make(made[make])
        return made[make]

    return directory


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numbers that a flipped bit made
@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_named_or_does_no_harm(kind, whole, tmp_path):
    _, name, load = KINDS[kind]
    directory = tmp_path / "damaged"
    shutil.copytree(whole(kind), directory)
    name = name if (directory / name).exists() else sorted(directory.glob("model-*.safetensors"))[0].name
    path = directory / name
    target, content = path if path.suffix == ".gguf" else directory, path.read_bytes()
    load(target)
    refused = 0
    for seed in range(SEEDS):
        draw = random.Random(f"{kind} {seed}")
        damage = changed if path.suffix == ".json" and draw.random() < 0.7 else flipped
        path.write_bytes(damage(content, draw))
        message = refusal(load, target)
        assert not message or str(directory) in message, seed
        refused += bool(message)
    assert refused or kind == "chat template"


CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"


def put(content: bytes | str) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(content if isinstance(content, bytes) else content.encode()) and None


def as_directory(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


def as_endless(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


def as_pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def as_broken_link(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("nowhere")


def as_loop(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(path.name)


def weight_map(file: Any) -> Callable[[Path], None]:
    return put(json.dumps({"weight_map": {"lm_head.weight": file}}))


def twice(key: str) -> Callable[[Path], None]:
    """Readers of JSON differ in which of the two they take."""
    again = json.dumps(key) + ": 0, " + json.dumps(key) + ":"
    return lambda path: path.write_text(path.read_text().replace(json.dumps(key) + ":", again, 1)) and None


def with_keys(**keys: Any) -> Callable[[Path], None]:
    return lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | keys)) and None


def retyped(path: Path) -> None:
    tensors = load_file(path)
    save_file(tensors | {"embedding.weight": tensors["embedding.weight"].to(torch.float8_e4m3fn)}, path)


@pytest.mark.parametrize(
    ("kind", "name", "harm", "load", "message"),
    [
        ("own weights", CONFIG, as_directory, load_model, r"config.json' cannot be read \(Is a directory\)"),
        ("own weights", CONFIG, as_endless, load_model, r"config.json' is a pipe or a device"),
        ("own weights", CONFIG, as_loop, load_model, r"config.json' cannot be read \(Too many levels"),
        ("own weights", CONFIG, as_pipe, load_model, r"config.json' is a pipe or a device"),
        ("own weights", CONFIG, put(b" " * (65 << 20)), load_model, r"config.json' has more than 67108864 bytes"),
        (
            "own weights",
            WEIGHTS,
            as_pipe,
            load_model,
            r"model.safetensors is not a readable safetensors file .it is not",
        ),
        ("own weights", "tokenizer.model", as_pipe, load_tokenizer, r"tokenizer.model"),
        ("exported tokenizer", "tokenizer_config.json", as_pipe, load_tokenizer, r"tokenizer_config.json' is a pipe"),
        (
            "exported tokenizer",
            "tokenizer_config.json",
            as_broken_link,
            load_tokenizer,
            r"is a link to a file that does",
        ),
        ("index", INDEX, as_broken_link, load_model, r"index.json is a link to a file that does not exist"),
        ("own weights", CONFIG, put(b""), load_model, r"config.json' is not JSON \(Expecting value"),
        ("own weights", CONFIG, put(b"\xff\xfe{}"), load_model, r"config.json' is not UTF-8"),
        ("own weights", CONFIG, put('{"a":' * 200_000), load_model, r"config.json' is not JSON .* nests too deep"),
        ("own weights", CONFIG, put("[" * 200_000), load_model, r"config.json' is not JSON .* nests too deep"),
        ("own weights", CONFIG, put('{"a": ' + "9" * 5000 + "}"), load_model, r"config.json' is not JSON \(Exceeds"),
        (
            "own weights",
            CONFIG,
            twice("vocab_size"),
            load_model,
            r"config.json' is not JSON \('vocab_size' is set twice",
        ),
        ("own weights", CONFIG, twice("format"), load_model, r"config.json' .*'format' is set twice; keep one of them"),
        ("own weights", CONFIG, with_keys(metdata={}), load_model, r"unknown key metdata; did you mean 'metadata'"),
        ("own weights", CONFIG, with_keys(metadata=0), load_model, r"config.json: metadata is a int, not an object"),
        (
            "exported configuration",
            CONFIG,
            twice("hidden_size"),
            load_model,
            r"config.json' .*'hidden_size' is set twice",
        ),
        (
            "exported tokenizer",
            "tokenizer_config.json",
            twice("bos_token"),
            load_tokenizer,
            r"'bos_token' is set twice",
        ),
        ("exported tokenizer", "tokenizer.json", twice("e"), load_tokenizer, r"tokenizer.json' .*'e' is set twice"),
        ("index", INDEX, twice("weight_map"), load_model, r"index.json' is not JSON \('weight_map' is set twice"),
        ("index", INDEX, twice("lm_head.weight"), load_model, r"index.json' .*'lm_head.weight' is set twice"),
        ("own weights", CONFIG, put("{}"), load_model, r"config.json: format=None is not"),
        (
            "own weights",
            CONFIG,
            put('{"format": "attnzoo-decoder-1"}'),
            load_model,
            r"config.json: model is a NoneType",
        ),
        ("own weights", CONFIG, put('{"model_type": ["llama"]}'), load_model, r"config.json: model_type=\['llama'\]"),
        ("own weights", CONFIG, put('{"model_type": "attnzoo", "decoder": []}'), load_model, r"decoder is a list"),
        ("own weights", WEIGHTS, as_directory, load_model, r"model.safetensors is not a readable safetensors file"),
        ("own weights", WEIGHTS, put(b""), load_model, r"model.safetensors is not a readable safetensors file"),
        ("own weights", WEIGHTS, lambda path: save_file({}, path), load_model, r"and there are 0 tensors"),
        ("own weights", WEIGHTS, retyped, load_model, r"tensor embedding.weight has dtype F8_E4M3"),
        ("own weights", "tokenizer.model", as_directory, load_tokenizer, r"tokenizer.model' is a directory"),
        ("own weights", "tokenizer.model", put(b""), load_tokenizer, r"tokenizer.model' is not a sentencepiece model"),
        ("exported tokenizer", "tokenizer.json", as_directory, load_tokenizer, r"tokenizer.json' is a directory"),
        (
            "exported tokenizer",
            "tokenizer.json",
            put('{"a":' * 200_000),
            load_tokenizer,
            r"tokenizer.json' is not a tok",
        ),
        ("exported tokenizer", "tokenizer_config.json", as_directory, load_tokenizer, r"tokenizer_config.json' cannot"),
        (
            "exported tokenizer",
            "tokenizer_config.json",
            put("[" * 200_000),
            load_tokenizer,
            r"config.json' .* too deep",
        ),
        (
            "exported tokenizer",
            "generation_config.json",
            as_directory,
            load_tokenizer,
            r"generation_config.json' cannot",
        ),
        (
            "exported tokenizer",
            "special_tokens_map.json",
            as_directory,
            load_tokenizer,
            r"special_tokens_map.json' cann",
        ),
        ("exported tokenizer", "chat_template.jinja", as_directory, load_tokenizer, r"chat_template.jinja' cannot"),
        ("index", INDEX, as_directory, load_model, r"index.json' cannot be read"),
        ("index", INDEX, as_loop, load_model, r"index.json' cannot be read"),
        ("index", INDEX, put("[" * 200_000), load_model, r"index.json' is not JSON .* nests too deep"),
        ("index", INDEX, put("[]"), load_model, r"index.json' holds a list"),
        ("index", INDEX, put('{"weight_map": []}'), load_model, r"index.json has no readable weight_map"),
        ("index", INDEX, put('{"weight_map": {}}'), load_model, r"and there are 0 tensors"),
        ("index", INDEX, weight_map(5), load_model, r"index.json has no readable weight_map"),
        ("index", INDEX, weight_map(""), load_model, r"lm_head.weight lies in ''"),
        ("index", INDEX, weight_map("."), load_model, r"lm_head.weight lies in '\.'"),
        ("index", INDEX, weight_map(".."), load_model, r"lm_head.weight lies in '\.\.'"),
        ("index", INDEX, weight_map("/etc/passwd"), load_model, r"lm_head.weight lies in '/etc/passwd'"),
        ("index", INDEX, weight_map("../../etc/passwd"), load_model, r"lm_head.weight lies in '../../etc/passwd'"),
        ("index", INDEX, weight_map("a\0b"), load_model, r"lm_head.weight lies in 'a\\x00b'"),
        ("index", INDEX, weight_map("\ud800"), load_model, r"lm_head.weight lies in '\\ud800'"),
        ("index", INDEX, weight_map("none.safetensors"), load_model, r"none.safetensors does not exist; is the check"),
        ("index", INDEX, weight_map("a" * 5000), load_model, r"a{5000}"),
    ],
)
def test_nonsense_is_named(kind, name, harm, load, message, whole, tmp_path):
    directory = tmp_path / "damaged"
    shutil.copytree(whole(kind), directory)
    harm(directory / name)
    with pytest.raises(ValueError, match=message) as raised:
        load(directory)
    assert str(directory) in str(raised.value)
    assert len(str(raised.value)) < 6000


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_paths_that_lead_nowhere(load, tmp_path):
    (tmp_path / "directory.gguf").mkdir()
    (tmp_path / "empty.gguf").touch()
    (tmp_path / "short.gguf").write_bytes(b"GGUF")
    os.mkfifo(tmp_path / "pipe.gguf")
    (tmp_path / "text").write_text("text")
    names = ["none", "none.gguf", "directory.gguf", "empty.gguf", "short.gguf", "pipe.gguf", "text", "text/below"]
    for name in [*names, "a" * 5000, "a" * 5000 + ".gguf"]:
        with pytest.raises(ValueError, match=name[:100]):
            load(tmp_path / name)
    for name in ("zero\0", "zero\0.gguf"):
        with pytest.raises(ValueError, match=r"null|does not exist"):
            load(tmp_path / name)
