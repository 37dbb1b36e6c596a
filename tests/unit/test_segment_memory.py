"""Transformer-XL's memory: with room for everything it is the parallel form; gradients end at it; its size is fixed."""

import pytest
import torch

from attnzoo.attention.segment_memory import SegmentMemory, attend_segment, remember
from attnzoo.models import DecoderConfig, DecoderLM
from tests.contract.cases import MODEL_DIM, all_cases, assert_close, build_case, case_name, inputs

KINDS = ["mha", "rmha", "mdha", "rcmha", "linear"]


def model(kind: str) -> DecoderLM:
    torch.manual_seed(0)
    return DecoderLM(
        DecoderConfig(
            vocab_size=17,
            model_dim=24,
            num_layers=3,
            attention={"kind": kind, "num_heads": 3},
            max_positions=32,
            init_std=0.3,
        )
    ).double()


@pytest.mark.parametrize("kind", KINDS)
def test_memory_with_room_for_all_is_the_parallel_form(kind):
    lm, tokens = model(kind), torch.randint(0, 17, (2, 13))
    memory, outputs = lm.init_memory(2, 16), []
    with torch.no_grad():
        for segment in tokens.split([4, 1, 6, 2], dim=1):
            logits, memory = lm.segment(segment, memory)
            outputs.append(logits)
        assert_close(torch.cat(outputs, dim=1), lm(tokens), kind)


CAUSAL = [case for case in all_cases() if build_case(*case).traits.causal]
OTHERS = [case for case in all_cases() if case not in CAUSAL]


@pytest.mark.parametrize("case", OTHERS, ids=lambda case: case_name(*case))
def test_what_is_not_causal_has_no_memory(case):
    memory = SegmentMemory.empty(2, 5, MODEL_DIM, dtype=torch.float64)
    with pytest.raises(ValueError, match="is not causal"):
        attend_segment(build_case(*case), inputs(2, 3, MODEL_DIM), memory)


@pytest.mark.parametrize("case", CAUSAL, ids=lambda case: case_name(*case))
def test_short_memory_is_a_run_over_memory_and_segment(case):
    attention, x = build_case(*case), inputs(2, 15, MODEL_DIM)
    memory = SegmentMemory.empty(2, 5, MODEL_DIM, dtype=torch.float64)
    with torch.no_grad():
        seen = 0
        for count in (3, 4, 7, 1):
            y, memory = attend_segment(attention, x[:, seen : seen + count], memory)
            first = max(seen - 5, 0)
            expected = attention(x[:, first : seen + count])[:, seen - first :]
            assert_close(y, expected, f"segment of {count} after {seen}")
            seen += count


def test_gradients_reach_the_weights_through_the_memory_but_not_its_inputs():
    attention, x = build_case("rmha", {"position": "sinusoid"}), inputs(1, 8, MODEL_DIM)
    first, second = x[:, :5].requires_grad_(), x[:, 5:].requires_grad_()
    memory = remember(SegmentMemory.empty(1, 5, MODEL_DIM, dtype=torch.float64), first)
    y, _ = attend_segment(attention, second, memory)
    y.square().sum().backward()
    through_memory = attention.projection.key.weight.grad.clone()
    assert first.grad is None
    attention.zero_grad()
    attention(torch.cat([first.detach(), second], dim=1))[:, 5:].square().sum().backward()
    assert_close(through_memory, attention.projection.key.weight.grad, "gradient of W_k", tolerance=1e-9)


def test_rows_of_unequal_memory_keep_their_own_last_tokens():
    memory = SegmentMemory(torch.zeros(2, 4, 1), torch.tensor([1, 3]))
    memory.hidden_BMD[0, 0], memory.hidden_BMD[1, :3, 0] = 10.0, torch.tensor([20.0, 21.0, 22.0])
    after = remember(memory, torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]]))
    assert after.counts_B.tolist() == [3, 4]
    assert after.hidden_BMD[..., 0].tolist() == [[10.0, 1.0, 2.0, 0.0], [21.0, 22.0, 3.0, 4.0]]


def test_memory_is_constant():
    lm = model("rcmha")
    memory = lm.init_memory(2, 6)
    size = sum(part.nbytes() for part in memory)
    assert size == 3 * (2 * 6 * 24 * 8 + 2 * 8)
    with torch.no_grad():
        for _ in range(4):
            _, memory = lm.segment(torch.randint(0, 17, (2, 5)), memory)
    assert sum(part.nbytes() for part in memory) == size
    with pytest.raises(ValueError, match="memory length=0 must be at least 1"):
        lm.init_memory(2, 0)
