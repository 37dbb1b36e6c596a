"""Drafts that fail cost time, and no text."""

from collections.abc import Callable

import pytest

from serve.engine import Engine
from serve.pools import SlotPool
from tests.helpers.drafting import sources, speculating
from tests.helpers.engines import SECRET, Fault, assert_empty, greedy, make_engine, prompts

WORK = prompts(3, seed=4)
KINDS = ["mha", "window", "mixed"]


def texts(engine: Engine) -> list[list[int]]:
    """All three at once."""
    requests = [engine.add_request(str(index), prompt, greedy(12)) for index, prompt in enumerate(WORK)]
    while engine.has_work():
        engine.step()
    assert_empty(engine)
    return [request.generated for request in requests]


def drafting(kind: str) -> tuple[Engine, list[list[int]]]:
    """(an engine whose drafts are right and wrong, the right texts)"""
    expected = texts(make_engine(kind))
    known = {tuple(prompt): text for prompt, text in zip(WORK, expected, strict=True)}
    return speculating(kind, sources(known)["half"]), expected


def in_the_last_layer(engine: Engine, fault: Fault, patch: pytest.MonkeyPatch) -> None:
    last, armed = engine.model.layers()[-1], []
    inner, whole = last.extend, SlotPool.verify

    def extend(x, state, *given):
        out = inner(x, state, *given)
        if armed:
            armed.clear()
            fault.fire()
        return out

    def verify(self, *given):
        if fault.fired < 3:
            armed.append(True)
        return whole(self, *given)

    patch.setattr(last, "extend", extend)
    patch.setattr(SlotPool, "verify", verify)


def in_the_logits(engine: Engine, fault: Fault, patch: pytest.MonkeyPatch) -> None:
    inner = engine.model.logits

    def logits(hidden):
        if hidden.shape[0] > 3 and fault.fired < 3:
            fault.fire()
        return inner(hidden)

    patch.setattr(engine.model, "logits", logits)


@pytest.mark.parametrize("where", [in_the_last_layer, in_the_logits])
@pytest.mark.parametrize("kind", KINDS)
def test_a_draft_that_fails_is_not_made(
    kind: str, where: Callable, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine, expected = drafting(kind)
    fault = Fault()
    where(engine, fault, monkeypatch)
    assert texts(engine) == expected
    assert fault.fired
    assert "tokens could not be drafted" in caplog.text
    assert SECRET not in caplog.text


def test_where_tokens_cannot_be_taken_back_their_requests_fail_and_the_engine_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine, expected = drafting("mixed")
    fault = Fault()
    for index, prompt in enumerate(WORK):
        engine.add_request(str(index), prompt, greedy(12))
    news = []
    with monkeypatch.context() as patch:
        patch.setattr(SlotPool, "keep", lambda *given: fault.fire())
        while engine.has_work():
            news += engine.step()
    last = [delta for delta in news if delta.finish_reason is not None]
    assert [delta.finish_reason for delta in last] == ["error"] * 3
    assert fault.fired
    assert texts(engine) == expected
