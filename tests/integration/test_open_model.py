"""The first snippet of the README, on SmolLM2's weights."""

import attnzoo
from attnzoo.checkpoint import load_model, load_tokenizer
from attnzoo.models import generate
from tests.helpers.gguf_files import smollm2

CAPITAL = "The capital of France is"


def test_smollm2_by_name():
    path = smollm2()
    lm = attnzoo.load("smollm2", pack_weights=False)
    assert lm.generate(CAPITAL, max_new_tokens=3).text.startswith(" Paris.")
    prompts = [CAPITAL, "def fibonacci(n):", "数学は"]
    ids = [load_tokenizer(path).encode(prompt, bos=True) for prompt in prompts]
    expected = generate(load_model(path), ids, max_new_tokens=10)
    assert [list(each.token_ids) for each in lm.generate(prompts, max_new_tokens=10, ignore_eos=True)] == expected
    kept = lm.generate(prompts[0] * 20, max_new_tokens=4, cache="d2o", keep_ratio=0.5)
    assert kept.cache.kv_bytes < 0.7 * kept.cache.kv_bytes_full
    assert kept.cache.not_compressed is None
    pieces = list(lm.stream_chat([{"role": "user", "content": "Is 7 a prime number?"}], max_new_tokens=6))
    assert len(pieces) > 1
    assert lm.logprobs("Paris is the capital of France.").total > lm.logprobs("Paris is the capital of Fridge.").total
