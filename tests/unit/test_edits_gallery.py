"""Methods of the literature, each a few lines of the language, equal to its paper's formula in plain torch."""

import pytest
import torch

from attnzoo.attention import build_attention
from attnzoo.attention.edits import (
    EditRun,
    Edits,
    Except,
    HeadFilter,
    Hide,
    Map,
    Mass,
    Move,
    PutScores,
    PutWeights,
    Raise,
    Scale,
    Sinks,
    Span,
    Temper,
    TokenLayout,
    Where,
    engine,
    layer_plan,
    layer_sizes,
)

DIM, HEADS, TOKENS, PROMPT = 18, 3, 12, 9
LAYOUT = TokenLayout(PROMPT, {"image": (1, 6), "instruction": (6, 8)})
CAUSAL = torch.ones(TOKENS, TOKENS).tril().bool()


@pytest.fixture(scope="module")
def layer():
    torch.manual_seed(0)
    made = build_attention("mha", {"model_dim": DIM, "num_heads": HEADS, "position": "none"}).double()
    for parameter in made.requires_grad_(False).parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.5)
    return made


@pytest.fixture(scope="module")
def x():
    return torch.randn(TOKENS, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def scores(layer, x, context=None):
    """(scores_NTS, values_NSH) of one sequence; what causality hides has -inf."""
    q, k, v = (
        each[0].transpose(0, 1) for each in layer.projection(x[None], None if context is None else context[None])
    )
    s = q @ k.mT / q.shape[-1] ** 0.5
    return (s if context is not None else s.masked_fill(~CAUSAL, float("-inf"))), v


def output(layer, weights, values):
    return layer.projection.merge((weights @ values)[None])[0]


def edited(layer, x, *items, layout=LAYOUT, context=None, step=None):
    """(y_TD, the run) of one sequence with edits."""
    size = layer_sizes(layer, context=context is not None)
    run = EditRun(Edits(*items).plan([size], layout, len(x) - layout.prompt))
    more = {} if context is None else {"context_BSD": context[None]}
    return layer(x[None], **more, edits=layer_plan([run], 0, step))[0], run


def test_attention_knock_out(layer, x):
    """Geva et al. 2023, arXiv 2304.14767: the last token may not look at the subject."""
    found, _ = edited(layer, x, Hide(Where(queries=Span(-1), keys="image")))
    s, v = scores(layer, x)
    s[:, PROMPT - 1, 1:6] = float("-inf")
    torch.testing.assert_close(found, output(layer, s.softmax(-1), v))


def test_pasta(layer, x):
    """Zhang et al. 2023, arXiv 2311.02262: in some heads, tokens that are not highlighted lose by alpha."""
    found, _ = edited(layer, x, Scale(Where(heads=[0, 2], keys=Except("instruction")), 0.01))
    s, v = scores(layer, x)
    weights = s.softmax(-1)
    steered = weights * torch.where((torch.arange(TOKENS) >= 6) & (torch.arange(TOKENS) < 8), 1.0, 0.01)
    weights[[0, 2]] = (steered / steered.sum(-1, keepdim=True))[[0, 2]]
    torch.testing.assert_close(found, output(layer, weights, v))


def test_spotlight(layer, x):
    """Venkateswaran and Contractor 2025, arXiv 2505.12025: a bias of log(target / share) on the scores of a span
    whose share of attention is below a target."""
    found, _ = edited(layer, x, Raise(Where(keys="instruction"), 0.3))
    s, v = scores(layer, x)
    share = s.softmax(-1)[..., 6:8].sum(-1, keepdim=True)
    bias = torch.where((share > 0) & (share < 0.3), (0.3 / share).log(), 0.0)
    s[..., 6:8] += torch.where(share > 0, bias, 0.0)
    torch.testing.assert_close(found, output(layer, s.softmax(-1), v))


def test_pai(layer, x):
    """Liu et al. 2024, arXiv 2407.21771: image scores of generated tokens grow by alpha times their magnitude, at
    decode as in a whole pass."""
    found, _ = edited(layer, x, Temper(Where(queries="generated", keys="image"), 1.5, magnitude=True))
    s, v = scores(layer, x)
    s[:, PROMPT:, 1:6] += 0.5 * s[:, PROMPT:, 1:6].abs()
    torch.testing.assert_close(found, output(layer, s.softmax(-1), v))


@pytest.mark.parametrize("alpha", [0.5, 1.5])
def test_adaptvis(layer, x, alpha):
    """Chen et al. 2025, arXiv 2503.01773: image scores of the last prompt token are sharpened or flattened."""
    found, _ = edited(layer, x, Temper(Where(queries=Span(-1), keys="image"), alpha))
    s, v = scores(layer, x)
    s[:, PROMPT - 1, 1:6] *= alpha
    torch.testing.assert_close(found, output(layer, s.softmax(-1), v))


def test_visual_attention_redistribution(layer, x, monkeypatch):
    """Kang et al. 2025, arXiv 2503.03321: image-centric heads give a portion p of what sinks have
    to the image tokens that are no sinks, in proportion."""
    monkeypatch.setattr(engine, "FEW", 1)
    tau, p, rho, least = 1.9, 0.6, 0.8, 0.2
    x = x.clone()
    x[[0, 3], 7] = 9.0
    sinks, image = torch.zeros(TOKENS, dtype=torch.bool), torch.zeros(TOKENS, dtype=torch.bool)
    sinks[:] = x[:, [7, 11]].abs().amax(-1) >= tau * x.pow(2).mean(-1).sqrt()
    image[1:6] = True
    assert sinks[3]
    assert not sinks[image].all()
    which = Sinks((7, 11), tau)
    heads = HeadFilter(of="image", min_mass=least, min_share=rho)
    bins = {"sinks": which, "image": "image"}
    found, run = edited(layer, x, Move(Where(keys=which), "image", p, heads), Mass(bins=bins))
    assert run.reading[0].engine == "partitioned"
    s, v = scores(layer, x)
    weights = s.softmax(-1)
    for n in range(HEADS):
        for t in range(TOKENS):
            row = weights[n, t].clone()
            ratio = row[image & ~sinks].sum() / row[image].sum() if row[image].sum() else 0.0
            if row[image].sum() >= least and ratio >= rho:
                budget = p * row[sinks].sum()
                weights[n, t, sinks] = (1 - p) * row[sinks]
                weights[n, t, image & ~sinks] = row[image & ~sinks] * (1 + budget / row[image & ~sinks].sum())
    assert not torch.equal(weights, s.softmax(-1))
    torch.testing.assert_close(found, output(layer, weights, v))
    torch.testing.assert_close(run.reading[0].mass["sinks"].double(), weights[..., sinks].sum(-1), rtol=0, atol=1e-6)


PICTURE = TokenLayout(TOKENS, {"left": (0, 5), "object": (2, 4)}, context=TokenLayout(5, {"dog": (1, 3)}), steps=10)
"""Queries are patches of a picture, keys the words of its caption."""


def test_prompt_to_prompt(layer, x):
    """Hertz et al. 2022, arXiv 2208.01626: in the first steps the words that both captions have keep the map
    of the source; and the map of a word (all of its tokens) is made stronger."""
    source, target = torch.randn(2, 5, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    _, run = edited(layer, x, Map(Where(keys=(0, 3, 4)), dtype="fp64"), layout=PICTURE, context=source, step=0)
    replace = PutWeights(Where(keys=(0, 3, 4), steps=":8"), run.reading[0].map)
    stronger = Scale(Where(keys="dog"), 2.0, renormalise=False)
    s, v = scores(layer, x, target)
    for step, kept in ((7, True), (8, False)):
        found, _ = edited(layer, x, replace, stronger, layout=PICTURE, context=target, step=step)
        weights = s.softmax(-1)
        if kept:
            weights[..., [0, 3, 4]] = scores(layer, x, source)[0].softmax(-1)[..., [0, 3, 4]]
        weights[..., 1:3] *= 2.0
        torch.testing.assert_close(found, output(layer, weights, v))


def test_region_constrained_cross_attention(layer, x):
    """Wang et al. 2024, arXiv 2403.05053: words of an object act in its region alone."""
    caption = torch.randn(5, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    only = Hide(Where(queries=Except("object"), keys="dog"))
    found, _ = edited(layer, x, only, layout=PICTURE, context=caption, step=0)
    s, v = scores(layer, x, caption)
    outside = torch.ones(TOKENS, dtype=torch.bool)
    outside[2:4] = False
    s[:, outside, 1:3] = float("-inf")
    torch.testing.assert_close(found, output(layer, s.softmax(-1), v))


def test_infusion_of_scores(layer, x):
    """Wang et al. 2024, arXiv 2403.05053: scores between object and background, in both directions, are those
    of the composed picture; softmax comes after."""
    other = torch.randn(TOKENS, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    prior = scores(layer, other, other)[0]
    background = [0, 1, *range(4, TOKENS)]
    infused = [
        PutScores(Where(queries="object", keys=Except("object")), prior[:, 2:4][..., background]),
        PutScores(Where(queries=Except("object"), keys="object"), prior[:, background][..., 2:4]),
    ]
    picture = TokenLayout(TOKENS, {"object": (2, 4)}, context=TokenLayout(TOKENS, {"object": (2, 4)}))
    found, _ = edited(layer, x, *infused, layout=picture, context=x)
    s, v = scores(layer, x, x)
    s[:, 2:4, :2], s[:, 2:4, 4:] = prior[:, 2:4, :2], prior[:, 2:4, 4:]
    s[:, :2, 2:4], s[:, 4:, 2:4] = prior[:, :2, 2:4], prior[:, 4:, 2:4]
    torch.testing.assert_close(found, output(layer, s.softmax(-1), v))


def test_attend_and_excite(layer, x):
    """Chefer et al. 2023, arXiv 2301.13826: the latent moves against the gradient of the most neglected word's
    loss, 1 - max over patches of its mean map: reads have gradients."""
    caption = torch.randn(5, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    latent = x.clone().requires_grad_()
    _, run = edited(layer, latent, Map(dtype="fp64"), layout=PICTURE, context=caption, step=0)
    loss = (1 - run.reading[0].map.mean(0)[:, 1:3].amax(0)).max()
    s, _ = scores(layer, latent, caption)
    expected = (1 - s.softmax(-1).mean(0)[:, 1:3].amax(0)).max()
    (found,), (right,) = torch.autograd.grad(loss, latent), torch.autograd.grad(expected, latent)
    torch.testing.assert_close(found, right)
    assert (found != 0).any()
