"""The prompt in front of an answer (`echo`), with log probabilities of its tokens if they are wanted."""

from collections.abc import Sequence
from dataclasses import dataclass

from attnzoo.models.sampling import TokenLogprobs
from attnzoo.tokenizer import Tokenizer


@dataclass(frozen=True)
class Echo:
    """A prompt as it is sent back. offsets: characters before each token. logprobs: of each token, None where nothing
    is known, as of the first."""

    text: str
    tokens: Sequence[int]
    offsets: Sequence[int]
    logprobs: Sequence[TokenLogprobs | None]


def echo_of(
    prompt: str | Sequence[int],
    tokens: Sequence[int],
    tokenizer: Tokenizer,
    logprobs: Sequence[TokenLogprobs | None] | None = None,
) -> Echo:
    """The echo of a prompt that was sent as a text or as its tokens. Raises nothing for tokens of the vocabulary."""
    decoder, said, offsets = tokenizer.decoder(), 0, list[int]()
    pieces = []
    for token in tokens:
        offsets.append(said)
        pieces.append(decoder.push(token))
        said += len(pieces[-1])
    text = prompt if isinstance(prompt, str) else "".join([*pieces, decoder.finish()])
    known = logprobs or [None] * len(tokens)
    return Echo(text, tokens, [min(offset, len(text)) for offset in offsets], known)
