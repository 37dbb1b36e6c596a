"""Compiled decode steps: the same function as `extend`, whatever the number of rows and their lengths."""

import pytest
import torch

from attnzoo.checkpoint import load_tokenizer
from attnzoo.models import CompiledDecode, DecoderConfig, DecoderLM, pack_weights
from serve.config import EngineConfig
from serve.engine import Engine
from serve.request import SamplingParams
from tests.serving import TOKENS, small_model, tokenizer_path
from tests.unit.test_packing import llama_like


def follow(model: DecoderLM, batch: int, lengths: list[int], steps: int, step: CompiledDecode) -> None:
    """Decodes by both forms from the same prompts and compares hidden states and states."""
    tokens = torch.randint(model.config.vocab_size, (batch, max(lengths)), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        states = []
        for _ in range(2):
            _, state = model.extend_hidden(tokens, model.init_state(batch, 160), torch.tensor(lengths))
            states.append(state)
        for new in torch.randint(model.config.vocab_size, (steps, batch, 1)):
            expected, states[0] = model.extend_hidden(new, states[0])
            torch.testing.assert_close(step(new, states[1]), expected, rtol=1e-4, atol=1e-4)
    for name, tensor in states[0].tensors().items():
        torch.testing.assert_close(states[1].tensors()[name], tensor, rtol=1e-4, atol=1e-4, msg=name)


def test_the_same_function():
    """Across a bucket's edge (64 slots), for one row and several, of equal and of unequal lengths."""
    model = pack_weights(llama_like())
    step = CompiledDecode(model)
    follow(model, 1, [61], 6, step)
    follow(model, 3, [61, 17, 40], 6, step)
    follow(model, 4, [9, 9, 9, 9], 3, step)


def test_a_full_state_is_refused():
    model = llama_like()
    with torch.inference_mode():
        _, state = model.extend_hidden(torch.zeros(1, 70, dtype=torch.long), model.init_state(1, 70))
    with pytest.raises(ValueError, match="room for 70 tokens, not 71"):
        CompiledDecode(model)(torch.zeros(1, 1, dtype=torch.long), state)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mdha", "linear"])
def test_the_same_function_for_each_variant(kind):
    model = small_model(kind, max_len=160)
    step = CompiledDecode(model)
    follow(model, 1, [61], 6, step)
    follow(model, 3, [61, 17, 40], 6, step)


def test_the_engine_says_the_same():
    model = small_model("mha")
    texts = []
    for compiled in (False, True):
        config = EngineConfig(checkpoint=str(tokenizer_path().parent), max_num_seqs=3, compile_decode=compiled)
        engine = Engine(config, model=model, tokenizer=load_tokenizer(tokenizer_path().parent))
        prompts = [[5, 9, 12], [7] * 9, [300, 20]]
        texts.append([done.tokens for done in engine.generate(prompts, SamplingParams(max_tokens=20, ignore_eos=True))])
    assert texts[0] == texts[1]


@pytest.mark.parametrize("kind", ["rmha", "rcmha", "sinusoid", "window"])
def test_what_cannot_be_compiled_is_refused(kind):
    with pytest.raises(ValueError, match=r"layer 0: decoding cannot be compiled for .*MHA.*compile_decode=False"):
        CompiledDecode(small_model(kind))


def test_a_compiler_is_needed(monkeypatch):
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    with pytest.raises(ValueError, match=r"needs a C\+\+ compiler"):
        CompiledDecode(DecoderLM(DecoderConfig(vocab_size=TOKENS, model_dim=16, num_layers=1)))
