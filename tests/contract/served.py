"""From a variant to an answer: what is saved loads again, in other dtypes too, and the server says what the model says.

What a layer keeps beside trained weights (buffers, saved or not, numbers without axes, frozen parameters) has to come
through all of it, or a variant fails when its training is over.
"""

import copy
import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from attnzoo.attention import ATTENTION, Attention
from attnzoo.checkpoint import load_model, save_model
from attnzoo.models import DecoderConfig, DecoderLM, build_shapes, generate
from serve.config import EngineConfig
from serve.engine import Engine
from serve.request import SamplingParams
from tests.helpers.serving import TOKENS, tokenizer

PROMPTS = [[5, 17, 301, 44, 9], [7], [29, 30, 31, 32, 33, 34, 35, 36, 37, 38, 39]]
NEW_TOKENS = 6


def decoder_of(attention: Attention) -> DecoderLM:
    """A small model of two such layers, sharp enough that a wrong state changes the text."""
    options = dataclasses.asdict(attention.config)
    model_dim = options.pop("model_dim")
    spec = {"kind": ATTENTION.name_of(type(attention)), **options}
    torch.manual_seed(0)
    config = DecoderConfig(
        vocab_size=TOKENS,
        model_dim=model_dim,
        num_layers=2,
        attention=spec,
        max_positions=64,
        tie_embeddings=False,
        init_std=0.3,
    )
    model = DecoderLM(config).eval()
    with torch.no_grad():
        for parameter in model.blocks.parameters():
            if parameter.requires_grad and not parameter.any():  # tables and biases that start at zero
                torch.nn.init.normal_(parameter, std=0.3)
        model.head.weight.mul_(20)
    return model


def check_served(build: Callable[[], Attention]) -> None:
    """Saved and loaded, the model is the same function; the server's greedy text is the plain loop's."""
    attention = build()
    if not attention.traits.causal:
        return
    model, tokens = decoder_of(attention), torch.tensor([PROMPTS[2]])
    assert {n: x.shape for n, x in build_shapes(model.config).state_dict().items()} == {
        n: x.shape for n, x in model.state_dict().items()
    }, "without storage (on the device meta) the model has other tensors"
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        path = save_model(Path(folder) / "model", model, tokenizer=tokenizer())
        loaded = load_model(path)
        same_tensors(model, loaded)
        assert torch.equal(loaded(tokens), model(tokens)), "saved and loaded, the model computes something else"
        half = load_model(path, dtype=torch.bfloat16)
        assert torch.equal(half(tokens), copy.deepcopy(model).bfloat16()(tokens)), "loaded in bfloat16 it differs"
        assert generate(half, PROMPTS, max_new_tokens=2), "loaded in bfloat16 it does not generate"
        expected = [generate(model, [prompt], max_new_tokens=NEW_TOKENS)[0] for prompt in PROMPTS]
        assert generate(loaded, PROMPTS, max_new_tokens=NEW_TOKENS) == expected, "loaded, it generates another text"
        assert answers(path) == expected, "the server says something else than the model"


def same_tensors(model: DecoderLM, loaded: DecoderLM) -> None:
    """Every parameter and buffer, saved or not."""
    for kind in ("named_parameters", "named_buffers"):
        theirs = dict(getattr(loaded, kind)())
        for name, tensor in getattr(model, kind)():
            assert name in theirs, f"{name} is gone once the model is loaded"
            assert not theirs[name].is_meta, f"{name} has no values once the model is loaded"
            assert theirs[name].dtype == tensor.dtype, f"{name} is {theirs[name].dtype} once loaded, not {tensor.dtype}"
            assert torch.equal(theirs[name], tensor), (
                f"{name} has other values once the model is loaded; a buffer with persistent=False must follow from "
                "the options alone, not from random numbers or training"
            )


def answers(path: Path) -> list[list[int]]:
    """The server's engine, all prompts at once."""
    settings = {"max_num_seqs": 4, "max_batched_tokens": 9, "max_queue": 100}
    engine = Engine(EngineConfig(checkpoint=str(path), **settings))
    params = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True)
    requests = []
    for index, prompt in enumerate(PROMPTS):
        engine.add_request(str(index), prompt, params)
        requests.append(engine._requests[str(index)])
    while engine.has_work():
        engine.step()
    return [list(request.generated) for request in requests]
