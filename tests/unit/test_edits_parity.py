"""Maps and edited logits of a small random Llama and of SmolLM2, beside transformers' eager attention."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

from attnzoo.attention.edits import EditRun, Edits, Hide, Map, Scale, Span, TokenLayout, Where
from attnzoo.checkpoint import load_model
from attnzoo.checkpoint.huggingface_export import family_config
from attnzoo.checkpoint.names import HUGGING_FACE, rename
from attnzoo.report import Report
from scripts import bench_edits
from tests.helpers.gguf_files import smollm2
from tests.helpers.open_weights import saved

LAYOUT = TokenLayout(9, {"image": (2, 6)})
TOKENS = torch.randint(0, 131, (2, 14), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=["llama", pytest.param("smollm2", marks=pytest.mark.heavy)])
def models(request, tmp_path_factory):
    if request.param == "llama":
        theirs, ours = saved("llama", tmp_path_factory.mktemp("llama"))
        return theirs.eval().requires_grad_(False), ours.eval().requires_grad_(False)
    ours = load_model(smollm2()).eval().requires_grad_(False)
    return theirs_of(ours), ours


def theirs_of(ours):
    """The same weights in transformers' model, as an export has them."""
    theirs = LlamaForCausalLM(LlamaConfig(**family_config(ours.config), attn_implementation="eager"))
    weights = {rename(name, HUGGING_FACE): tensor for name, tensor in ours.state_dict().items()}
    theirs.load_state_dict(weights, assign=True)
    return theirs.eval().requires_grad_(False)


def planned(model, *items):
    return [EditRun(model.plan_edits(Edits(*items), LAYOUT, 5)) for _ in TOKENS]


@torch.no_grad()
def test_maps_of_every_query_head(models):
    """Kills: kv heads for query heads; scores for weights."""
    theirs, ours = models
    expected = theirs(TOKENS, output_attentions=True).attentions
    runs = planned(ours, Map(dtype="fp32"))
    ours(TOKENS, edits=runs)
    for layer, maps in enumerate(expected):
        for row, run in enumerate(runs):
            torch.testing.assert_close(run.reading[layer].map, maps[row].float(), rtol=0, atol=1e-4)


@torch.no_grad()
def test_edited_logits(models, monkeypatch):
    """Kills: an edit in the wrong layer, head or row; keys and values of later layers without it."""
    theirs, ours = models
    last = theirs.config.num_hidden_layers - 1
    items = [
        Scale(Where(layers=[0, 2, -1], heads=[1, 4], keys="image"), 3.0),
        Hide(Where(layers=1, heads="2:", queries=Span(6, 14), keys=Span(0, 2))),
    ]

    def eager(module, query, key, value, attention_mask, scaling, dropout=0.0, **_options):
        group = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        scores = query @ key.transpose(2, 3) * scaling
        scores = scores + torch.full_like(scores[0, 0], float("-inf")).triu(1)
        if module.layer_idx == 1:
            scores[:, 2:, 6:14, 0:2] = float("-inf")
        weights = scores.softmax(-1)
        if module.layer_idx in (0, 2, last):
            steered = weights.clone()
            steered[..., 2:6] *= 3.0
            weights[:, [1, 4]] = (steered / steered.sum(-1, keepdim=True))[:, [1, 4]]
        return (weights @ value).transpose(1, 2).contiguous(), weights

    plain = theirs(TOKENS).logits
    monkeypatch.setattr(modeling_llama, "eager_attention_forward", eager)
    expected = theirs(TOKENS).logits
    assert (expected - plain).abs().max() > 0.01
    torch.testing.assert_close(ours(TOKENS, edits=planned(ours, *items)), expected, rtol=1e-4, atol=1e-4)
    state, outs, runs = ours.init_state(2, 14), [], planned(ours, *items)
    for chunk in TOKENS.split([9, 1, 1, 3], dim=1):
        out, state = ours.extend(chunk, state, edits=runs)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 1), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_redistribution_beside_a_hook_on_whole_maps():
    """What the benchmark of edits compares is the same function, with its sinks and its filter of heads at work."""
    report = Report.start(command=[])
    bench_edits.prefill(report, layers=3, tokens=40, turns=1)
    row = report.rows[0]
    assert row["moves logits by"] > 0.01
    assert row["from the hook's"] < 1e-4
