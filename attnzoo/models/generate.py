"""Generation of tokens: for samples during training, and as the reference for a server's texts."""

from collections.abc import Sequence
from dataclasses import asdict

from attnzoo.attention.edits import EditRuns
from attnzoo.kvcache import CachePolicy
from attnzoo.models.decoder_lm import DecoderLM
from attnzoo.models.generation_config import GenerationConfig
from attnzoo.models.sampling import Sampling
from attnzoo.models.sequences import Sequences

GREEDY = Sampling()


def generate(
    model: DecoderLM,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    seed: int | None = None,
    stop_token: int | None = None,
    cache: CachePolicy | None = None,
    edits: EditRuns | None = None,
) -> list[list[int]]:
    """Continues each prompt (token ids, unequal lengths welcome) by up to max_new_tokens; returns the new tokens.

    A sequence ends before `stop_token`, which is not returned. cache: a policy from `attnzoo.kvcache.build_cache`;
    None: the full cache. edits: a run for each prompt, or None. seed: as in `GenerationConfig`. Training or evaluation
    mode stays as it is. Raises ValueError for no prompts, an empty prompt, a token outside the vocabulary,
    max_new_tokens below 0, a seed of more than 64 bits, logits that are not finite, or a model whose cache cannot be
    compressed.
    """
    if type(max_new_tokens) is not int or max_new_tokens < 0:
        raise ValueError(f"max_new_tokens={max_new_tokens!r} must be an integer of at least 0")
    config = GenerationConfig(**asdict(sampling) | {"max_new_tokens": max_new_tokens or None, "seed": seed})
    sequences = Sequences(model, prompts, config, cache=cache, edits=edits)
    outputs: list[list[int]] = [[] for _ in prompts]
    for _ in range(max_new_tokens):
        for row, token, _found in sequences.step():
            if token == stop_token:
                sequences.end(row)
            else:
                outputs[row].append(token)
        if not sequences.running:
            break
    return outputs
