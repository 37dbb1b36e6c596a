"""The language model: mixing variants, initialisation, counts, and its streaming form."""

import math

import pytest
import torch

from attnzoo.attention import ATTENTION, build_attention
from attnzoo.models import DecoderConfig, DecoderLM, Sampling, generate

V = 47


def build(**changes) -> DecoderLM:
    torch.manual_seed(0)
    values = {"vocab_size": V, "model_dim": 24, "num_layers": 2, "max_positions": 11} | changes
    return DecoderLM(DecoderConfig.from_dict(values))


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, V, shape, generator=torch.Generator().manual_seed(seed))


CAUSAL = [kind for kind in ATTENTION if build_attention(kind, {"model_dim": 8}).traits.causal]
ATTENTIONS = [*CAUSAL, ["rcmha", "linear"], [{"kind": "mha", "num_kv_heads": 2}, "rmha"]]


@pytest.mark.parametrize("attention", ATTENTIONS, ids=str)
def test_extend_equals_forward(attention):
    model, ids = build(attention=attention).double(), tokens(3, 17)
    with torch.no_grad():
        expected, state, outputs = model(ids), model.init_state(3, 5), []
        for chunk in ids.split([1, 4, 2, 1, 9], dim=1):
            logits, state = model.extend(chunk, state)
            outputs.append(logits)
    torch.testing.assert_close(torch.cat(outputs, 1), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
@pytest.mark.parametrize("mlp", ["swiglu", "gelu", "relu"])
@pytest.mark.parametrize("tie", [True, False])
def test_choices(norm, mlp, tie):
    model = build(norm=norm, mlp=mlp, tie_embeddings=tie)
    assert (model.head.weight is model.embedding.weight) == tie
    loss = model.loss(tokens(2, 9), tokens(2, 9, seed=1))
    # Small weights predict nothing yet: the loss of a uniform guess.
    assert abs(loss.item() - math.log(V)) < 0.1
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_initialisation():
    model = build(model_dim=192, num_layers=8, vocab_size=997, attention={"kind": "mha", "num_heads": 4})
    block = model.layers()[3]
    small = 0.02 / math.sqrt(16)
    for weight, std in [
        (model.embedding.weight, 0.02),
        (block.attention.projection.query.weight, 0.02),
        (block.mlp.up.weight, 0.02),
        (block.attention.projection.output.weight, small),
        (block.mlp.down.weight, small),
    ]:
        assert abs(weight.std().item() / std - 1) < 0.05


def test_ignored_targets_do_not_count():
    model, ids, targets = build(), tokens(2, 9), tokens(2, 9, seed=1)
    targets[:, 5:] = -100
    expected = torch.nn.functional.cross_entropy(model(ids)[:, :5].flatten(0, 1), targets[:, :5].flatten())
    torch.testing.assert_close(model.loss(ids, targets), expected)
    whole = torch.tensor(40.0)
    torch.testing.assert_close(model.loss(ids, targets, count=whole), expected * 10 / 40)


def test_without_a_target_loss_and_gradients_are_zero():
    model, ids = build(), tokens(2, 9)
    loss = model.loss(ids, torch.full_like(ids, -100))
    assert loss.item() == 0.0
    loss.backward()
    assert all(not parameter.grad.any() for parameter in model.parameters())


def test_activation_checkpointing_changes_no_gradient():
    model, ids, targets = build(attention=["rcmha", "linear"]), tokens(2, 9), tokens(2, 9, seed=1)
    model.loss(ids, targets).backward()
    plain = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model.activation_checkpointing = True
    model.loss(ids, targets).backward()
    for before, parameter in zip(plain, model.parameters(), strict=True):
        assert torch.equal(before, parameter.grad)


def test_parameter_counts_by_hand():
    model = build(attention={"kind": "rcmha", "num_heads": 4}, mlp="relu", tie_embeddings=False)
    dim, heads, width, rows = 24, 4, 6, 11
    attention = 4 * dim * dim + dim + 3 * heads * width * 3 + heads * width + heads * rows * (width + 1)
    block = attention + 2 * dim * 4 * dim + 2 * dim
    assert model.num_parameters(embeddings=False) == 2 * block + dim
    assert model.num_parameters() == 2 * block + dim + 2 * V * dim
    assert model.cost(1, 1, 1).parameters == model.num_parameters()


def test_matrix_parameters_are_linear_maps_of_the_blocks():
    model = build(attention=["rcmha", "linear"])
    names = [name for name, _ in model.matrix_parameters()]
    known = dict(model.named_parameters())
    assert all(known[name] is parameter for name, parameter in model.matrix_parameters())
    assert len(names) == 2 * (4 + 3)
    assert not [name for name in names if "conv" in name or "table" in name or "embedding" in name or "head" in name]


def test_cost_of_a_decode_step_by_hand():
    model = build(attention={"kind": "mha", "num_heads": 4}, mlp="relu")
    weights = 2 * (4 * 24 * 24 + 2 * 24 * 96) + V * 24
    attention = 2 * (2 * 2 * 24 * 10)  # two layers: q.k and p.v over 10 tokens
    cost = model.cost(batch=3, tokens=1, context=10)
    assert cost.flops == 3 * (2 * weights + attention)
    assert cost.state_bytes == model.init_state(3, 10).nbytes() == 3 * 2 * (2 * 10 * 24 * 4 + 8)


def test_non_causal_variant_is_refused(monkeypatch):
    from dataclasses import replace

    from attnzoo.attention.composed import ComposedAttention

    causal = ComposedAttention.traits.fget
    monkeypatch.setattr(ComposedAttention, "traits", property(lambda self: replace(causal(self), masks=frozenset())))
    with pytest.raises(ValueError, match="'mha' is not causal"):
        build(attention="mha")


def test_variants_that_are_not_causal_are_refused():
    others = [kind for kind in ATTENTION if kind not in CAUSAL]
    assert others == ["in_context_linear", "softmax_regression", "tscan"]
    for kind in others:
        with pytest.raises(ValueError, match=f"'{kind}' is not causal, and a decoder language model needs a causal"):
            build(attention=kind)


@pytest.mark.parametrize("attention", ATTENTIONS, ids=str)
def test_greedy_generation_equals_the_parallel_form(attention):
    """Each new token is the argmax of the parallel form over all tokens so far; rows do not disturb each other."""
    model = build(attention=attention).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    prompts = [[1, 2, 3, 4, 5], [6], [7, 8]]
    outputs = generate(model, prompts, max_new_tokens=6)
    for prompt, output in zip(prompts, outputs, strict=True):
        so_far = list(prompt)
        with torch.no_grad():
            for token in output:
                assert token == model(torch.tensor([so_far]))[0, -1].argmax().item()
                so_far.append(token)
        assert len(output) == 6


def test_generation_stops_and_seeds():
    model = build(attention="mha")
    greedy = generate(model, [[1, 2]], max_new_tokens=5)[0]
    stopped = generate(model, [[1, 2]], max_new_tokens=5, stop_token=greedy[0])[0]
    assert stopped == []
    hot = Sampling(temperature=1.0)
    drawn = [generate(model, [[1, 2]], max_new_tokens=20, sampling=hot, seed=seed)[0] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "at least one prompt"),
        ([[]], "no prompt may be empty"),
        ([[1], []], "no prompt may be empty"),
        ([[V]], "prompt token 47 is outside"),
        ([[-1]], "prompt token -1 is outside"),
        ([[1.5]], "prompt token 1.5 is not an integer"),
        (["text"], "prompt token 't' is not an integer"),
        ([[None]], "prompt token None is not an integer"),
    ],
)
def test_generation_refuses(prompts, message):
    with pytest.raises(ValueError, match=message):
        generate(build(), prompts, max_new_tokens=1)


@pytest.mark.parametrize("count", [-1, True, 1.0, None])
def test_generation_refuses_counts(count):
    with pytest.raises(ValueError, match=f"max_new_tokens={count} must be an integer of at least 0"):
        generate(build(), [[1]], max_new_tokens=count)


def test_generation_of_nothing():
    assert generate(build(), [[1], [2, 3]], max_new_tokens=0) == [[], []]


@pytest.mark.parametrize("attention", ATTENTIONS, ids=str)
@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (
            torch.zeros(2, 0, dtype=torch.long),
            r"tokens_BT has shape \(2, 0\); give at least one sequence and one token",
        ),
        (torch.zeros(0, 3, dtype=torch.long), r"tokens_BT has shape \(0, 3\)"),
        (torch.zeros(0, 0, dtype=torch.long), r"tokens_BT has shape \(0, 0\)"),
        (torch.zeros(3, dtype=torch.long), r"tokens_BT has shape \(3,\)"),
        (torch.zeros(1, 2, 3, dtype=torch.long), r"tokens_BT has shape \(1, 2, 3\)"),
        (torch.tensor([[1, V]]), r"tokens_BT holds ids from 1 to 47; the vocabulary has 47"),
        (torch.tensor([[-1, 2]]), r"tokens_BT holds ids from -1 to 2; the vocabulary has 47"),
        (torch.zeros(1, 2), r"tokens_BT is of torch.float32; token ids are torch.long"),
    ],
)
def test_empty_and_foreign_tokens_are_refused(attention, tokens, message):
    """Of every form, and the state is as it was."""
    model = build(attention=attention)
    state = model.init_state(1, 8)
    memory = model.init_memory(1, 4)
    forms = [model, model.hidden, lambda ids: model.extend(ids, state), lambda ids: model.segment(ids, memory)]
    for form in forms:
        with pytest.raises(ValueError, match=message):
            form(tokens)
    assert torch.equal(
        model.extend(torch.tensor([[1]]), state)[0], model.extend(torch.tensor([[1]]), model.init_state(1, 8))[0]
    )


@pytest.mark.parametrize("batch", [0, -1])
def test_states_of_no_sequences_are_refused(batch):
    with pytest.raises(ValueError, match=f"batch={batch} must be at least 1"):
        build().init_state(batch, 8)


class Rows(torch.overrides.TorchFunctionMode):
    """The most rows that the head has been asked for."""

    def __init__(self, head: torch.Tensor) -> None:
        super().__init__()
        self.head, self.most = head, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.linear and args[1] is self.head:
            self.most = max(self.most, args[0].shape[:-1].numel())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ATTENTIONS, ids=str)
@torch.no_grad()
def test_generation_computes_the_logits_of_last_tokens_alone(attention, dtype):
    model = build(attention=attention).to(dtype)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    prompts = [[1, 2, 3, 4, 5], [6], [7, 8]]
    with Rows(model.head.weight) as rows:
        outputs = generate(model, prompts, max_new_tokens=6)
    assert rows.most == len(prompts)
    lengths = torch.tensor([5, 1, 2])
    padded = torch.tensor([[1, 2, 3, 4, 5], [6, 0, 0, 0, 0], [7, 8, 0, 0, 0]])
    logits, _ = model.extend(padded, model.init_state(3, 11), lengths)
    for row, last_V in zip(outputs, logits[torch.arange(3), lengths - 1], strict=True):
        # A product of other sizes rounds otherwise, so that nearly equal logits may change places.
        assert last_V.max() - last_V[row[0]] <= 2 * torch.finfo(dtype).eps * last_V.abs().max()
