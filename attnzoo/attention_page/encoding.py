"""The data in a page, as JSON:

    {"model": "smollm2", "num_layers": 30, "notes": ["layer 3 is left out: ..."],
     "tokens": [{"text": "The", "control": false}, ...],
     "layers": [{"layer": 0, "variant": "MultiHeadAttention", "heads": [0, 2], "weights": "AAA8..."}, ...]}

weights: base64 of float16 numbers, least byte first; head by head, in each head query by query, for each query its keys
0 to the query itself. What comes after a query is left out: it is hidden in a decoder.

text: what a token stands for, with signs in place of characters that have no picture of their own. control: a token
that stands for no text, such as the one that begins it; `text` is then its name in the vocabulary.
"""

import base64
import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnzoo.tokenizer import Tokenizer

SIGNS = {"\n": "\N{RETURN SYMBOL}", "\t": "\N{RIGHTWARDS ARROW TO BAR}", "\r": "\N{SYMBOL FOR CARRIAGE RETURN}"}


@dataclass(frozen=True)
class Token:
    """A token as people read it; the fields are those of the page's data."""

    text: str
    control: bool = False


def tokens_of(tokenizer: Tokenizer, ids: Sequence[int]) -> tuple[Token, ...]:
    """The tokens as people read them. Bytes that are a part of a character alone are written as \\xe2."""
    found = []
    for token in ids:
        data = tokenizer.token_bytes(token)
        text = data.decode("utf-8", errors="backslashreplace") if data else tokenizer.spelling(token)
        found.append(Token(readable(text), not data))
    return tuple(found)


def readable(text: str) -> str:
    """The text with signs for what cannot be seen or would change how its neighbours look.

    >>> readable("a\\tb\\u202e")
    'a⇥bU+202E'
    """
    return "".join(_sign(character) for character in text)


def _sign(character: str) -> str:
    if character in SIGNS:
        return SIGNS[character]
    hidden = unicodedata.category(character) in ("Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp")
    return f"U+{ord(character):04X}" if hidden else character


def encoded_weights(weights_NTT: Tensor) -> str:
    """The text of the field `weights`, from [heads, queries, keys]."""
    tokens = weights_NTT.shape[-1]
    queries, keys = torch.tril_indices(tokens, tokens)
    packed = weights_NTT.detach().cpu()[:, queries, keys].to(torch.float16).numpy()
    return base64.b64encode(packed.astype("<f2").tobytes()).decode("ascii")


def decoded_weights(text: str, heads: int, tokens: int) -> Tensor:
    """The inverse of `encoded_weights`, with zeros for what is left out."""
    numbers = torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.float16)
    queries, keys = torch.tril_indices(tokens, tokens)
    weights_NTT = torch.zeros(heads, tokens, tokens, dtype=torch.float16)
    weights_NTT[:, queries, keys] = numbers.view(heads, -1)
    return weights_NTT


def page_bytes(heads: int, tokens: int) -> int:
    """Bytes that the weights of this many heads take in a page; the rest of a page is small."""
    return heads * tokens * (tokens + 1) // 2 * 2 * 4 // 3


def in_script(content: Any) -> str:
    """JSON that may stand in an element `script`: whatever a token says, it ends no element and opens no comment."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
