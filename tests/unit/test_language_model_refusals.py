"""What a language model refuses, by the name of the field and with the way out."""

import dataclasses
from typing import Any

import pytest
import torch

from attnzoo import LanguageModel
from attnzoo.kvcache import build_cache
from attnzoo.models import DecoderLM
from tests.helpers.serving import lm_of, tokenizer

REFUSED: list[tuple[Any, dict[str, Any], str]] = [
    ([], {}, "prompts is empty"),
    ({"prompt": "a"}, {}, "prompts has type dict"),
    (7, {}, "prompts has type int"),
    ([3.5], {}, r"prompts\[0\]=3.5 has type float"),
    ([True], {}, r"prompts\[0\]=True has type bool"),
    (["a", None], {}, r"prompts\[1\]=None has type NoneType"),
    ([[]], {}, "the prompt is empty"),
    ("", {}, "the prompt is empty"),
    (["a", ""], {}, r"prompts\[1\] is empty"),
    ([400], {}, "prompt token 400 is outside the vocabulary of 400"),
    (b"abc", {}, "prompts has type bytes"),
    (["a", b"b"], {}, r"prompts\[1\]=b'b' has type bytes"),
    ("a" * 200, {}, r"context is 64 tokens, and \d+ were asked for .*shorten the prompt or lower max_new_tokens"),
    (
        "a",
        {"max_new_tokens": 64},
        r"context is 64 tokens, and 66 were asked for \(2 in the prompt, max_new_tokens=64\)",
    ),
    ("a", {"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
    ("a", {"max_new_tokens": True}, "max_new_tokens=True has type bool; it must be a whole number or None"),
    ("a", {"temperature": -1}, "temperature=-1 must be"),
    ("a", {"temperature": "hot"}, "temperature='hot' has type str"),
    ("a", {"top_p": 0}, "top_p=0 must be greater than 0"),
    ("a", {"top_k": -1}, r"top_k=-1 must be 0 \(off\)"),
    ("a", {"top_k": 1.5}, "top_k=1.5 has type float"),
    ("a", {"seed": 2**64}, "seed=18446744073709551616 must fit into 64 bits"),
    ("a", {"stop": 3}, "stop=3 must be a string or a list of strings"),
    ("a", {"stop": ["x", ""]}, "holds an empty string"),
    ("a", {"logprobs": -1}, "logprobs=-1 must be at least 0"),
    ("a", {"logprobs": True}, "logprobs=True has type bool"),
    ("a", {"n": 0}, "n=0 must be at least 1"),
    ("a", {"n": 10**9, "temperature": 1.0}, "n=1000000000 must be at least 1 and at most 16384"),
    ("a", {"n": 2}, "n=2 with temperature=0.0 would give the same text 2 times"),
    ("a", {"ignore_eos": 1}, "ignore_eos=1 has type int"),
    ("a", {"batch_size": 0}, "batch_size=0 must be a whole number"),
    ("a", {"generation_config": {"n": 1}}, "generation_config has type dict"),
    ("a", {"max_tokens": 5}, "unknown option 'max_tokens': use max_new_tokens"),
    ("a", {"do_sample": True}, "unknown option 'do_sample': set temperature instead"),
    ("a", {"temprature": 1}, "unknown option 'temprature'; did you mean 'temperature'"),
    ("a", {"cahce": "d2o"}, "unknown option 'cahce'; did you mean 'cache'.* cache, edits, .* read, .* spans, "),
    (
        "a",
        {"spans": {"word": "a"}},
        "spans name parts of a prompt for edits and read, and there are none; leave it out",
    ),
    ("a", {"keep_ratio": 0.5}, "keep_ratio=0.5 is an option of cache policies; name one, cache='d2o'"),
    ("a", {"cache": "d20"}, "cache.policy='d20' is not known; did you mean 'd2o'"),
    ("a", {"cache": 3}, "cache=3 has type int"),
    ("a", {"cache": {"keep_ratio": 0.5}}, "cache.policy is missing: name one of d2o"),
    ("a", {"cache": "d2o", "keep_ration": 0.5}, "unknown option 'keep_ration'; did you mean 'keep_ratio'"),
    ("a", {"cache": "d2o", "keep_ratio": 1.5}, "keep_ratio=1.5 is the part that is kept"),
    ("a", {"cache": "d2o", "sinks": 65}, "cache.sinks=65 is more than the 64 tokens"),
    ("a", {"cache": {"policy": "d2o", "sinks": 1}, "sinks": 2}, "sinks=2 is given twice, cache has sinks=1"),
    ("a", {"cache": "streaming", "votes": True}, "unknown option 'votes'"),
    ("a", {"cache": "d2o", "votes": True, "merge_counts": True}, "votes is the old name of .*merge_counts"),
    ("a", {"cache": build_cache("d2o"), "sinks": 2}, "sinks: cache is an object, d2o"),
]


@pytest.mark.parametrize(("prompts", "options", "message"), REFUSED, ids=[row[2][:40] for row in REFUSED])
def test_what_cannot_be_is_refused_by_name(prompts, options, message):
    lm = lm_of("mha")
    with pytest.raises(ValueError, match=message):
        lm.generate(prompts, **options)
    if "batch_size" not in options:
        with pytest.raises(ValueError, match=message if prompts not in ([[]], ["a", ""]) else "takes one prompt"):
            lm.stream(prompts, **options)  # before the first piece


def test_an_empty_text_is_refused_though_a_begin_token_precedes_it():
    lm = lm_of("mha")
    assert lm.encode("") == [lm.tokenizer.bos_id]
    for call in (lm.logprobs, lm.cost):
        with pytest.raises(ValueError, match="the prompt is empty"):
            call("")
    with pytest.raises(ValueError, match=r"prompts\[1\] is empty"):
        lm.logprobs(["a", ""])
    assert lm.logprobs([lm.tokenizer.bos_id]).logprobs == (None,)


def test_other_refusals():
    lm = lm_of("linear")
    with pytest.raises(ValueError, match="no keys to compress"):
        lm.generate("a", cache="d2o")
    with pytest.raises(ValueError, match="stream takes one prompt, not a list of 2"):
        lm.stream(["a", "b"])
    with pytest.raises(ValueError, match="n=2: a stream is one text"):
        lm.stream("a", n=2, temperature=1.0)
    with pytest.raises(ValueError, match="context is 64 tokens"):
        lm.logprobs("a" * 200)
    for size in (0, True):
        with pytest.raises(ValueError, match=f"prompt={size} must be a whole number, at least 1"):
            lm.cost(size)
    with pytest.raises(ValueError, match="batch=0 must be a whole number, at least 1"):
        lm.cost(5, batch=0)
    with pytest.raises(ValueError, match=r"^prompt=1.5 must be a text, token ids, or a number of tokens"):
        lm.cost(1.5)
    with pytest.raises(ValueError, match=r"unknown option 'keep'; known: cache$"):
        lm.cost(5, keep=1)
    with pytest.raises(ValueError, match="n=2 is a generation option; cost takes only cache options"):
        lm.cost(5, n=2)
    with pytest.raises(ValueError, match="cost takes one prompt, not a list of 2; give one, and batch=2"):
        lm.cost(["a", "b"])
    with pytest.raises(ValueError, match="text has type NoneType; give a str"):
        lm.encode(None)  # type: ignore[arg-type]
    for model, words, field in ((lm, tokenizer(), "model"), (lm.model, "smollm2", "tokenizer")):
        with pytest.raises(ValueError, match=f"{field} has type "):
            LanguageModel(model, words)
    config = dataclasses.replace(lm.config, vocab_size=399)
    with pytest.raises(ValueError, match="mine: the tokenizer knows 400 tokens, the model only 399"):
        LanguageModel(DecoderLM(config), tokenizer(), name="mine")
    broken = lm_of("mha")
    broken.model.head.weight[7] = torch.nan
    for call in (broken.generate, broken.logprobs):
        with pytest.raises(ValueError, match="logits are not finite"):
            call("a text")
