"""Trained, saved, loaded and extended: what comes back is the same model, in our own form and in transformers'.

What a layer keeps beside trained matrices (numbers without axes, buffers, saved or not, integers, what training counts,
parameters that are frozen or have two names) has to come through, or a variant fails when its training is over.
"""

import copy
import dataclasses
import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from attnzoo.attention import ATTENTION, Attention
from attnzoo.checkpoint import load_model, save_model
from attnzoo.models import DecoderConfig, DecoderLM, build_shapes
from attnzoo.models.shapes import shared_parameters
from tests.contract.cases import streams
from tests.helpers.serving import TOKENS

PROMPT = torch.tensor([[29, 30, 31, 32, 33, 34, 35]])


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


def check_saved(build: Callable[[], Attention]) -> None:
    """A model that has been trained a step is the same once saved and loaded, streams the same, and trains on."""
    attention = build()
    if not streams(attention):
        return
    model = decoder_of(attention)
    step(model)
    model.eval()
    assert {n: x.shape for n, x in build_shapes(model.config).state_dict().items()} == {
        n: x.shape for n, x in model.state_dict().items()
    }, "without storage (on the device meta) the model has other tensors"
    with tempfile.TemporaryDirectory() as folder:
        path = save_model(Path(folder) / "model", model)
        loaded = load_model(path)
        check_same(model, loaded, "loaded")
        check_same(copy.deepcopy(model).bfloat16(), load_model(path, dtype=torch.bfloat16), "loaded in bfloat16")
        if importlib.util.find_spec("transformers") is not None:
            check_same(model, through_transformers(model, Path(folder) / "other"), "loaded by transformers")
    continued = DecoderLM(model.config)
    continued.load_state_dict(loaded.state_dict())
    assert torch.equal(step(continued), step(model)), "trained on after loading, the loss is another"
    same_tensors(model, continued, "trained on")


def step(model: DecoderLM) -> Tensor:
    """One step of training; its loss."""
    model.train()
    model.zero_grad()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    loss = model.loss(PROMPT[:, :-1], PROMPT[:, 1:])
    loss.backward()
    optimizer.step()
    return loss.detach()


def through_transformers(model: DecoderLM, directory: Path) -> DecoderLM:
    """What `from_pretrained` makes of the model's export, copied: it leaves weights where they begin in the file, and
    some processors add in another order where that is not a multiple of 64 bytes."""
    import attnzoo.hf

    attnzoo.hf.export_model(directory, model)
    loaded = attnzoo.hf.AttnzooForCausalLM.from_pretrained(directory).model
    trained = [{name for name, p in each.named_parameters() if p.requires_grad} for each in (model, loaded)]
    assert trained[0] == trained[1], f"{trained[0] ^ trained[1]} trains on one side only once loaded by transformers"
    return copy.deepcopy(loaded)


@torch.no_grad()
def check_same(model: DecoderLM, loaded: DecoderLM, when: str) -> None:
    """The tensors, the parallel form and the streaming form."""
    same_tensors(model, loaded, when)
    assert torch.equal(loaded(PROMPT), model(PROMPT)), f"{when}, the model computes something else"
    for one, other in zip(streamed(model), streamed(loaded), strict=True):
        assert torch.equal(one, other), f"{when}, the model streams something else"


def streamed(model: DecoderLM) -> list[Tensor]:
    """Logits of a chunk of four tokens and three of one."""
    state, found = model.init_state(1, PROMPT.shape[1]), []
    for chunk in PROMPT.split([4, 1, 1, 1], dim=1):
        logits_BTV, state = model.extend(chunk, state)
        found.append(logits_BTV)
    return found


def same_tensors(model: DecoderLM, loaded: DecoderLM, when: str) -> None:
    """Every parameter and buffer, saved or not, in its shape and dtype and under its names."""
    for kind in ("named_parameters", "named_buffers"):
        theirs = dict(getattr(loaded, kind)(remove_duplicate=False))
        for name, tensor in getattr(model, kind)(remove_duplicate=False):
            assert name in theirs, f"{name} is gone once the model is {when}"
            found = theirs[name]
            assert not found.is_meta, f"{name} has no values once the model is {when}"
            assert found.dtype == tensor.dtype, f"{name} is {found.dtype} once {when}, not {tensor.dtype}"
            assert found.shape == tensor.shape, f"{name} is {list(found.shape)} once {when}, not {list(tensor.shape)}"
            assert torch.equal(found, tensor), (
                f"{name} has other values once the model is {when}; a buffer with persistent=False must follow from "
                "the options alone, not from random numbers or training"
            )
    assert shared_parameters(loaded) == shared_parameters(model), f"other parameters have two names once {when}"
