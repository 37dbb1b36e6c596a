"""How much of a prompt a step reads, from how long steps took."""

import pytest

from serve.scheduling.pace import FIRST, LEAST, PromptPace


def run(pace: PromptPace, seconds, steps: int = 30) -> int:
    """Steps that take `seconds(prompt tokens)`; the answer they end at."""
    for _ in range(steps):
        tokens = pace.prompt_tokens
        pace.measured(1, tokens, seconds(tokens))
    return pace.prompt_tokens


@pytest.mark.parametrize("token_s", [1e-9, 1e-5, 1e-4, 1e-3, 1e-2, 1.0, 100.0])
def test_steps_come_to_last_about_the_target(token_s):
    pace = PromptPace(0.2)
    assert pace.prompt_tokens == FIRST
    for _ in range(5):
        pace.measured(1, 0, 0.01)
    found = run(pace, lambda tokens: 0.02 + token_s * tokens)
    assert found == LEAST or 0.02 + token_s * found <= 0.21
    assert found & (found - 1) == 0
    assert found == max(LEAST, found)
    assert token_s > 1e-3 or found * 2 * token_s > 0.15, "less than there is time for"


def test_it_recovers_from_a_step_that_took_long():
    pace = PromptPace(0.2)
    run(pace, lambda tokens: 1e-3 * tokens)
    before = pace.prompt_tokens
    pace.measured(1, before, 60.0)
    assert pace.prompt_tokens == LEAST
    assert run(pace, lambda tokens: 1e-3 * tokens) == before


def test_tiny_prompts_say_nothing_about_long_ones():
    pace = PromptPace(0.2)
    for _ in range(9):
        pace.measured(1, 3, 0.1)
    assert pace.prompt_tokens == FIRST


def test_without_a_target_there_is_no_bound():
    pace = PromptPace(None)
    pace.measured(1, 64, 9.0)
    assert pace.prompt_tokens is None


@pytest.mark.parametrize("seconds", [0.0, 1e-300, 1e300])
def test_no_clock_breaks_it(seconds):
    pace = PromptPace(0.2)
    for decoding, tokens in ((0, 64), (1, 0), (1, 64), (0, 512)):
        pace.measured(decoding, tokens, seconds)
        assert pace.prompt_tokens >= LEAST
