"""Drafts of next tokens that are right, wrong, and both."""

import random
from typing import Any

from serve.engine import Engine
from serve.request import Request
from serve.speculation import Source, Speculation, Speed
from tests.helpers.engines import make_engine
from tests.helpers.serving import TOKENS


class Always(Speed):
    """Drafts whatever that takes, so that no clock decides what a test sees."""

    def pays(self, rows: int, expected: float) -> bool:
        return True


def speculating(kind: str = "rcmha", source: Source | None = None, most: int = 5, **settings: Any) -> Engine:
    """An engine that drafts wherever the source does (None: what is looked up)."""
    return draft_always(make_engine(kind, prompt_lookup=most, **settings), source)


def draft_always(engine: Engine, source: Source | None = None) -> Engine:
    """The engine, with drafts of this source (None: what is looked up)."""
    engine.speculation = Speculation(engine.config.prompt_lookup, source)
    engine.speculation.speed = Always()
    return engine


def sources(texts: dict[tuple[int, ...], list[int]]) -> dict[str, Source]:
    """Drafts by what is known of the right texts, by their prompts."""
    draw = random.Random(0)

    def right(request: Request, most: int) -> list[int]:
        at = len(request.generated)
        return texts[tuple(request.prompt)][at : at + most]

    def wrong(request: Request, most: int) -> list[int]:
        return [(token + 1) % TOKENS for token in right(request, most)]

    def half(request: Request, most: int) -> list[int]:
        keep = draw.randrange(most + 1)
        return right(request, most)[:keep] + wrong(request, most)[keep:]

    def sometimes(request: Request, most: int) -> list[int]:
        return half(request, most)[: draw.choice([0, 0, 1, most])]

    return {"right": right, "wrong": wrong, "half": half, "sometimes": sometimes}
