"""What the serving tests share: small sharp models with random weights, and a tokenizer trained on a few lines."""

import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from attnzoo.checkpoint import save_model
from attnzoo.language_model import LanguageModel
from attnzoo.models import DecoderConfig, DecoderLM
from attnzoo.tokenizer import SentencePieceTokenizer, Tokenizer
from train.tokenizer import train_tokenizer

KINDS: dict[str, list[dict]] = {
    "mha": [{"kind": "mha"}],
    "rmha": [{"kind": "rmha"}],
    "sinusoid": [{"kind": "rmha", "position": "sinusoid"}],
    "mdha": [{"kind": "mdha"}],
    "rcmha": [{"kind": "rcmha"}],
    "linear": [{"kind": "linear"}],
    "mixed": [{"kind": "rcmha"}, {"kind": "linear"}],
    "window": [{"kind": "rcmha", "window": 7, "sinks": 2}],
}
MAX_LEN, TOKENS = 64, 400

TEXT = """The slots of the state are numbered, and a sequence that leaves is replaced by the last one.
Der Zustand einer Folge ist mehr als Schlüssel und Werte: es gehören auch die letzten Zeilen dazu.
Le serveur répond à chaque pas; 数据 流 进来, 文字 出去. Emoji too: 🙂 🚀.
def step(self): return self.update(self.sample(self.run(self.schedule())))
"""


@lru_cache(maxsize=1)
def tokenizer_path() -> Path:
    """A sentencepiece model of `TOKENS` pieces, with byte fallback."""
    directory = Path(tempfile.mkdtemp(prefix="attnzoo-test-"))
    return train_tokenizer(TEXT.splitlines() * 20, vocab_size=TOKENS, path=directory / "tokenizer.model")


def small_model(kind: str, *, layers: int = 2, dim: int = 32, seed: int = 0, max_len: int = MAX_LEN) -> DecoderLM:
    """Random weights, scaled so that the context matters and the best token wins clearly.

    Tables, kernels and biases that start at zero are drawn as well: a state that is lost must change the text.
    """
    torch.manual_seed(seed)
    config = DecoderConfig(
        vocab_size=TOKENS,
        model_dim=dim,
        num_layers=layers,
        attention=[spec | {"num_heads": 4} for spec in KINDS[kind]],
        max_positions=max_len,
        tie_embeddings=False,
        init_std=0.3,
    )
    model = DecoderLM(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "table" in name or "bias" in name or "kernel" in name:
            parameter.add_(torch.randn_like(parameter) * 0.5)
    model.head.weight.mul_(20)
    return model


LLAMA_LIKE = {"kind": "mha", "num_heads": 4, "num_kv_heads": 2, "qkv_bias": True, "output_bias": True, "qk_norm": True}


def llama_like(dtype: torch.dtype = torch.float32, **changes: Any) -> DecoderLM:
    """A small model with grouped heads, biases and normalised queries and keys, as open weights have them."""
    torch.manual_seed(2)
    values = {"vocab_size": 77, "model_dim": 48, "num_layers": 2, "attention": LLAMA_LIKE, "init_std": 0.2}
    model = DecoderLM(DecoderConfig(**values | changes))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    return model.to(dtype).eval().requires_grad_(False)


def export(directory: Path, kind: str = "rcmha", **options: int) -> Path:
    """A checkpoint with a small model."""
    return save_model(directory, small_model(kind, **options), tokenizer=tokenizer())


@lru_cache(maxsize=1)
def tokenizer() -> Tokenizer:
    return SentencePieceTokenizer.load(tokenizer_path())


def lm_of(kind: str = "rcmha") -> LanguageModel:
    """A small model with its tokenizer."""
    return LanguageModel(small_model(kind), tokenizer())


CHAT_TEMPLATE = """{%- for message in messages -%}
{%- if message.role == 'system' and not loop.first -%}{{ raise_exception('system must come first') }}{%- endif -%}
{{ bos_token }}{{ message.role }}: {{ message.content }}{{ eos_token }}
{% endfor -%}
{%- if add_generation_prompt -%}assistant:{% endif -%}"""


@lru_cache(maxsize=1)
def chat_tokenizer() -> Tokenizer:
    """The same one, of a model that knows conversations. Token 5 ends an answer as the end token does."""
    found = SentencePieceTokenizer.load(tokenizer_path())
    found.chat_template = CHAT_TEMPLATE
    found.stop_ids = found.stop_ids | {5}  # an instance's own
    return found
