"""Continuations with penalties, biases and bars, one number at a time in plain Python: what the engine must repeat."""

import math
from collections import Counter
from collections.abc import Collection, Sequence

import torch

from attnzoo.models import DecoderLM, Sampling

OPTIONS = {
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": 0.7},
    "repetition": {"repetition_penalty": 1.8},
    "less repetition": {"repetition_penalty": 0.4},
    "bias": {"logit_bias": {3: 6.5, 7: -100, 11: -1}},
    "all": {
        "presence_penalty": -0.5,
        "frequency_penalty": 1.1,
        "repetition_penalty": 1.3,
        "logit_bias": {5: 2.5, 6: -3},
    },
}


def soft(model: DecoderLM) -> DecoderLM:
    """The model with a tenth of its logits, so that penalties change what is likeliest."""
    model.head.weight.mul_(0.1)
    return model


def penalised(
    logits: Sequence[float], options: Sampling, prompt: Sequence[int], generated: Sequence[int], barred: Collection[int]
) -> list[float]:
    """The logits that a token is chosen by."""
    counts, seen = Counter(generated), {*prompt, *generated}
    found = []
    for token, value in enumerate(logits):
        value += options.logit_bias.get(token, 0.0)
        if token in barred:
            value = -math.inf
        if token in seen:
            value = value / options.repetition_penalty if value > 0 else value * options.repetition_penalty
        value -= options.frequency_penalty * counts[token]
        value -= options.presence_penalty * (token in counts)
        found.append(value)
    return found


def greedy_tokens(
    model: DecoderLM, prompt: Sequence[int], options: Sampling, count: int, ends: Collection[int] = (), least: int = 0
) -> list[int]:
    """At most `count` tokens, the likeliest each, up to one of `ends`, which do not come before `least` tokens."""
    generated: list[int] = []
    while len(generated) < count and not (generated and generated[-1] in ends):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *generated]]))[0, -1].tolist()
        barred = ends if len(generated) < least else ()
        values = penalised(logits, options, prompt, generated, barred)
        generated.append(values.index(max(values)))
    return generated
