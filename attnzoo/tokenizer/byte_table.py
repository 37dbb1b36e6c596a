"""The bytes that every token of a tokenizers vocabulary stands for, found from its decoder.

Two families of decoders have an exact table. Byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM2) spells each byte as one
printable character. Sentencepiece-like BPE (Llama 2, Mistral) writes a space as U+2581 and bytes without a piece as
<0x..>; its decoder may strip the space that encoding put before a text. A vocabulary that was trained here writes a
space as a space (`attnzoo.tokenizer.convert`).
"""

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPACE = "\u2581"
SPACED = [
    ("Replace", "ByteFallback", "Fuse"),
    ("Replace", "ByteFallback", "Fuse", "Strip"),
    ("Metaspace",),
]
"""Step names of the decoders that write a space as U+2581."""
PLAIN = ("ByteFallback", "Fuse")
"""The decoder of a vocabulary in which every character stands for itself."""
STEPS: dict[str, dict[str, Any]] = {
    "Replace": {"pattern": {"String": SPACE}, "content": " "},
    "Strip": {"content": " ", "start": 1, "stop": 0},
    "Metaspace": {"replacement": SPACE},
}
"""The supported parameters of steps; other steps have none that matter."""


def byte_table(tokenizer: "Tokenizer", vocab: dict[str, int], source: str) -> tuple[list[bytes], bool]:
    """(bytes of all tokens up to the last of `vocab`, whether decoding strips a text's first space).

    Special tokens and unused ids have no bytes. Raises ValueError, naming `source`, for a decoder of another family.
    """
    steps = decoder_steps(tokenizer)
    kinds = tuple(step["type"] for step in steps)
    byte_level = kinds == ("ByteLevel",)
    plain = kinds == PLAIN
    if not byte_level and not plain and not (kinds in SPACED and all(map(_is_known, steps))):
        raise ValueError(
            f"{source}: decoder {json.dumps(steps, ensure_ascii=False) if steps else 'None'} is not supported; known: "
            f"ByteLevel, {', '.join('+'.join(known) for known in SPACED)} with {SPACE!r} for a space, "
            f"{'+'.join(PLAIN)}. Use a checkpoint with a byte-level or sentencepiece-like BPE tokenizer"
        )
    spelled = ByteLevelSpelling() if byte_level else None
    fallback = "ByteFallback" in kinds
    table = [b""] * (max(vocab.values()) + 1)
    for token, number in vocab.items():
        table[number] = spelled.read(token) if spelled else _spaced_bytes(token, fallback, "" if plain else SPACE)
    for number, added in tokenizer.get_added_tokens_decoder().items():
        if added.special:
            table[number] = b""
        elif byte_level:  # found in the text itself, before bytes are spelled as characters
            table[number] = added.content.encode()
    return table, "Strip" in kinds or (kinds == ("Metaspace",) and _prepends(steps[0]))


def decoder_steps(tokenizer: "Tokenizer") -> list[dict[str, Any]]:
    """What a decoder does, step by step, as tokenizer.json writes it; empty without a decoder."""
    if tokenizer.decoder is None:
        return []
    state: dict[str, Any] = json.loads(tokenizer.decoder.__getstate__())
    steps: list[dict[str, Any]] = state["decoders"] if state["type"] == "Sequence" else [state]
    return steps


class ByteLevelSpelling:
    """GPT-2's spelling of bytes: printable Latin-1 characters stand for themselves, others are U+0100 onwards."""

    def __init__(self) -> None:
        printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
        others = [byte for byte in range(0x100) if byte not in printable]
        self._bytes = {byte: byte for byte in printable} | {0x100 + n: byte for n, byte in enumerate(others)}
        self._alphabet = frozenset(map(chr, self._bytes))

    def read(self, token: str) -> bytes:
        """The bytes that `token` spells; a token with other characters stands for itself."""
        if self._alphabet.issuperset(token):
            return token.translate(self._bytes).encode("latin-1")
        return token.encode()


def _spaced_bytes(token: str, fallback: bool, space: str) -> bytes:
    if fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return bytes.fromhex(token[3:5])
        except ValueError:
            pass  # a token like <0xyz> is text
    return (token.replace(space, " ") if space else token).encode()


def _is_known(step: dict[str, Any]) -> bool:
    return all(step[key] == value for key, value in STEPS.get(step["type"], {}).items())


def _prepends(metaspace: dict[str, Any]) -> bool:
    return bool(metaspace.get("prepend_scheme", "always") != "never")
