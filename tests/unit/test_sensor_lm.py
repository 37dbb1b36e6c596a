"""PH-LLM's adapter: virtual tokens inside prompts of a frozen language model."""

import pytest
import torch

from attnzoo.kvcache import CACHES, build_cache
from attnzoo.models import DecoderConfig, DecoderLM, Prompt, PromptedLM, SensorAdapter, SensorConfig
from attnzoo.models.sensor_lm import answer_scores

V, D, M = 47, 24, 3
NO, YES, SURELY = (5,), (7,), (7, 9, 11)
PROMPTS = [
    Prompt((1, 2, 3, 4), (6, 8), (NO, YES)),
    Prompt((1, 13), (), (NO, YES)),
    Prompt((1, 2, 9, 4, 30, 31, 32), (12,), (NO, SURELY)),
]


def decoder(attention="mha", **changes) -> DecoderLM:
    torch.manual_seed(0)
    config = {"vocab_size": V, "model_dim": D, "num_layers": 2, "max_positions": 23, "attention": attention} | changes
    model = DecoderLM(DecoderConfig.from_dict(config)).double().eval()
    for parameter in model.parameters():  # large weights, so that every token matters
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(0, V, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("policy", [name for name in CACHES if name not in ("full", "none")])
def test_caches_work_after_virtual_tokens(policy: str) -> None:
    """A prompt read as embeddings, then decoded by tokens: the same as read by tokens, compressed or not."""
    lm, prompt, later = decoder(), ids(2, 13), ids(2, 3)
    options = {"keep_ratio": 0.5} if "keep_ratio" in CACHES.get(policy).Config.__dataclass_fields__ else {}
    outputs = []
    for x in (prompt, lm.embed(prompt)):
        state = lm.init_state(2, 16, cache=build_cache(policy, options))
        with torch.no_grad():
            _, state = lm.extend(x[:, :6], state)
            _, state = lm.extend(x[:, 6:], state)
            outputs.append(lm.extend(later, lm.compress(state))[0])
    assert torch.equal(*outputs)


def test_virtual_tokens_stream_as_they_are_read_at_once() -> None:
    lm, virtual = decoder(), torch.randn(2, M, D, dtype=torch.float64)
    x = torch.cat([lm.embed(ids(2, 5)), virtual, lm.embed(ids(2, 4))], dim=1)
    with torch.no_grad():
        whole, state, parts = lm(x), lm.init_state(2, 12), []
        for part in (x[:, :1], x[:, 1:6], x[:, 6:8], ids(2, 4)):  # the end by tokens
            logits, state = lm.extend(part, state)
            parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-11)
    for wrong, message in (
        (x[..., :-1], r"embeddings of shape \(2, 12, 23\) .* 24 numbers \(model_dim\) a token"),
        (x[:, :0], "at least one sequence and one token"),
        (x.long(), r"tokens_BT has shape \(2, 12, 24\); give"),
    ):
        with pytest.raises(ValueError, match=message):
            lm(wrong)


def by_hand(lm: DecoderLM, prompt: Prompt, virtual_MD: torch.Tensor) -> list[torch.Tensor]:
    """Each answer's log probability, by one whole forward pass and the chain rule."""
    unit = lm.embedding.weight.square().mean().sqrt()
    found = []
    for answer in prompt.answers:
        given = [lm.embedding.weight[list(prompt.before)], virtual_MD * unit]
        given += [lm.embedding.weight[list(part)] for part in (prompt.after, answer)]
        log_probs_TV = lm(torch.cat(given)[None])[0].log_softmax(-1)
        found.append(sum(log_probs_TV[-len(answer) - 1 + i, token] for i, token in enumerate(answer)))
    return found


@pytest.mark.parametrize("attention", ["mha", "rcmha", ["rmha", "linear"]], ids=str)
@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1] * 2, PROMPTS[:2]], ids=["unequal", "equal", "single"])
def test_kept_states_change_no_likelihood_and_no_gradient(attention, prompts: list[Prompt]) -> None:
    lm = decoder(attention)
    reader, adapter = (
        PromptedLM(lm, prompts),
        SensorAdapter(SensorConfig(numbers=6, width=D, tokens=M, hidden=5)).double(),
    )
    numbers_NF = torch.randn(4, 6, dtype=torch.float64)
    found_NQA = reader.log_likelihoods(adapter(numbers_NF))
    wanted_NQA = torch.stack(
        [torch.stack([torch.stack(by_hand(lm, prompt, row)) for prompt in prompts]) for row in adapter(numbers_NF)]
    )
    torch.testing.assert_close(found_NQA.double(), wanted_NQA, rtol=0, atol=1e-5)
    scores_NQ = answer_scores(found_NQA)
    torch.testing.assert_close(scores_NQ.double(), wanted_NQA[..., 1] - wanted_NQA[..., 0], rtol=0, atol=1e-5)
    weights = list(adapter.parameters())
    one, other = (
        torch.autograd.grad(scores.sum(), weights) for scores in (scores_NQ, wanted_NQA[..., 1] - wanted_NQA[..., 0])
    )
    for mine, theirs in zip(one, other, strict=True):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in lm.parameters())
    # The kept states are as they were: asking again tells the same.
    assert torch.equal(found_NQA, reader.log_likelihoods(adapter(numbers_NF)))


def test_rows_do_not_see_each_other_and_zeroed_tokens_tell_nothing() -> None:
    reader, virtual_NMD = PromptedLM(decoder(), PROMPTS), torch.randn(5, M, D, dtype=torch.float64)
    together = reader.log_likelihoods(virtual_NMD)
    alone = torch.cat([reader.log_likelihoods(row[None]) for row in virtual_NMD])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    zeroed = reader.log_likelihoods(torch.zeros_like(virtual_NMD))
    assert (zeroed == zeroed[:1]).all()
    assert (together - zeroed).abs().max() > 0.01


def test_what_makes_no_prompt_is_refused() -> None:
    for values, message in (
        (((), (6,), (NO, YES)), "no token before the virtual ones"),
        (((1,), (6,), (NO,)), "give at least two answers"),
        (((1,), (6,), (NO, ())), "of at least one token each"),
        (((1,), (6,), (NO, NO)), "two answers have the same tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            Prompt(*values)
    with pytest.raises(ValueError, match=r"prompts have \[2, 3\] answers"):
        PromptedLM(decoder(), [PROMPTS[0], Prompt((1,), (), (NO, YES, SURELY))])
    reader = PromptedLM(decoder(), PROMPTS)
    with pytest.raises(ValueError, match=r"a prompt with 15 virtual tokens and its answer takes 26 tokens; .* is 23"):
        reader.log_likelihoods(torch.zeros(1, 15, D, dtype=torch.float64))
    for values, message in (
        ({"numbers": 0, "width": 4}, "numbers=0 must be at least 1"),
        ({"numbers": 4, "width": 4, "dropout": 1.0}, "dropout=1.0 must be at least 0 and below 1"),
    ):
        with pytest.raises(ValueError, match=message):
            SensorConfig(**values)
    with pytest.raises(ValueError, match=r"numbers_NF has shape \(2, 3\); give 4 numbers a row"):
        SensorAdapter(SensorConfig(numbers=4, width=4))(torch.zeros(2, 3))
