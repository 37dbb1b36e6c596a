"""Packed weights: the same function, the same counts, and no way to lose weights by mistake."""

import copy
import pickle

import pytest
import torch

from attnzoo.checkpoint import save_model
from attnzoo.models import DecoderLM, can_pack, generate, pack_weights
from tests.helpers.serving import KINDS, llama_like, small_model


def twins(build, *arguments, **options) -> tuple[DecoderLM, DecoderLM]:
    return build(*arguments, **options), pack_weights(build(*arguments, **options))


MODELS = [
    *((small_model, (kind,), {}) for kind in KINDS),
    (llama_like, (), {}),
    (llama_like, (), {"mlp_bias": True, "tie_embeddings": False}),
    (llama_like, (), {"mlp": "gelu", "mlp_bias": True}),
    (llama_like, (torch.bfloat16,), {}),
]


@pytest.mark.parametrize(
    ("build", "arguments", "options"),
    MODELS,
    ids=[f"{build.__name__} {arguments} {options}" for build, arguments, options in MODELS],
)
def test_the_same_function(build, arguments, options):
    plain = build(*arguments, **options)
    if not can_pack(plain):  # a CPU without products of bfloat16
        with pytest.raises(ValueError, match="cannot be packed; leave them as they are"):
            pack_weights(plain)
        return
    plain, packed = twins(build, *arguments, **options)
    tokens = torch.randint(plain.config.vocab_size, (3, 29), generator=torch.Generator().manual_seed(1))
    expected = plain(tokens)
    close = {"rtol": 0, "atol": 1e-4 * float(expected.abs().max())} if expected.dtype == torch.float32 else {}
    torch.testing.assert_close(packed(tokens), expected, **close)
    states = [model.init_state(3, 8) for model in (plain, packed)]
    for chunk in tokens.split([5, 1, 1, 22], dim=1):
        outs = []
        for i, model in enumerate((plain, packed)):
            out, states[i] = model.extend(chunk, states[i])
            outs.append(out)
        torch.testing.assert_close(outs[1], outs[0], **close)


def test_the_same_text():
    plain, packed = twins(small_model, "rcmha")
    prompts = [[5, 9, 12], [7] * 9, [300, 20]]
    assert generate(packed, prompts, max_new_tokens=20) == generate(plain, prompts, max_new_tokens=20)


@pytest.mark.parametrize("tie", [True, False])
def test_counts_stay(tie):
    plain, packed = twins(llama_like, tie_embeddings=tie)
    assert packed.cost(2, 1, 9) == plain.cost(2, 1, 9)
    assert packed.num_parameters() == plain.num_parameters()
    assert packed.num_parameters(embeddings=False) == plain.num_parameters(embeddings=False)
    state = packed.init_state(2, 5)
    assert all(tensor.device.type == "cpu" for tensor in state.tensors().values())


def test_weights_lose_their_storage_and_saving_fails(tmp_path):
    packed = pack_weights(llama_like(tie_embeddings=False))
    held = {name for name, parameter in packed.named_parameters() if not parameter.is_meta and parameter.dim() == 2}
    assert held == {"embedding.weight"}
    before = packed(torch.arange(9)[None])
    for write in (
        lambda: save_model(tmp_path / "model", packed),
        packed.state_dict,
        lambda: packed.load_state_dict(llama_like(tie_embeddings=False).state_dict()),
        lambda: copy.deepcopy(packed),
        lambda: pickle.dumps(packed),
        packed.half,
        lambda: packed.to("meta"),
    ):
        with pytest.raises(ValueError, match=r"are packed for inference.*pack_weights=False"):
            write()
    assert not list(tmp_path.iterdir())
    assert torch.equal(packed.to("cpu").float().eval()(torch.arange(9)[None]), before)
    with pytest.raises((NotImplementedError, RuntimeError)):
        packed.layers()[0].mlp.up(torch.zeros(1, 48)).item()


def test_what_cannot_be_packed_is_refused():
    model = llama_like(torch.float64)
    assert not can_pack(model)
    with pytest.raises(ValueError, match=r"weights in torch.float64 on cpu cannot be packed"):
        pack_weights(model)
