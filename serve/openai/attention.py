"""The field `attention` of both interfaces: what a request reads and edits of attention, planned before it runs.

{"edits": [...], "read": [...], "spans": {"name": [start, stop]}}, in the language of `attnzoo.attention.edits`. All
that can be wrong is refused here, before anything is computed. `serve.openai.readings` writes what was read.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from attnzoo.attention.edits import After, Edit, EditPlan, Edits, Except, Item, Read, Sinks, layer_sizes
from attnzoo.attention.edits.items import HeadFilter, Where
from attnzoo.errors import suggest
from attnzoo.generation import AttentionWish
from attnzoo.tokenizer import Tokenizer
from attnzoo.tokenizer.spans import message_spans, token_spans
from serve.async_engine import AsyncEngine
from serve.config import ServeConfig
from serve.maps import MapsFullError, MapStore
from serve.openai.encoding import in_thread
from serve.openai.errors import MAX_QUOTED, ApiError, unsupported
from serve.openai.protocol import GenerationRequest
from serve.openai.readings import INLINE_BYTES, Readings, inline_bytes, map_bytes
from serve.openai.redistribution import Redistributed, items_of

KEYS = ("edits", "read", "spans")
MAX_ITEMS = 32
"""Most edits and reads of a request."""
MAX_PIECES = 256
"""Most numbers, spans and names in all of them together, a name as often as it stands in the prompt: what an item costs
beside its arithmetic grows with these."""
MAX_SPANS = 16
"""Most names in `spans`; every text is looked for in every prompt."""
MAX_SINKS = 2
"""Most different kinds of sinks in a request; keys fall into twice as many classes with each."""


@dataclass(frozen=True)
class Desk:
    """Takes the field `attention` of requests, and has the maps of their answers."""

    engine: AsyncEngine
    config: ServeConfig
    maps: MapStore

    @classmethod
    def of(cls, engine: AsyncEngine, config: ServeConfig) -> "Desk":
        """The desk of a server."""
        return cls(engine, config, MapStore(config.attention_total_bytes, config.attention_ttl_s))

    def card(self) -> dict[str, Any]:
        """What can be read and edited, for the list of models."""
        layers = []
        for number, block in enumerate(self.engine.engine.model.layers()):
            size = layer_sizes(block.attention)
            can = size.editing
            layers.append(
                {
                    "layer": number,
                    "variant": size.variant,
                    "heads": size.num_heads,
                    "kv_heads": size.num_kv_heads,
                    "reads": can.reads and can.streams,
                    "scores": can.scores and can.streams,
                    "weights": can.weights and can.streams,
                    "why_not": can.why_not or None,
                }
            )
        return {"allowed": self.config.attention, "max_bytes": self.config.attention_max_bytes, "layers": layers}

    async def readings(
        self,
        request: GenerationRequest,
        prompts: Sequence[tuple[Sequence[int], int]],
        copies: int,
        messages: Sequence[Mapping[str, str]] = (),
        redistributed: Redistributed | None = None,
    ) -> Readings | None:
        """Plans what the choices of a request read and edit, and reserves room for their maps; None: nothing.

        prompts: (tokens, most new tokens) of each. messages: those of a conversation, whose contents have names.
        redistributed: the edits of its field `redistribution`. Raises ApiError: 400 for all that cannot be, 429 without
        room.
        """
        given = request.attention
        if given is None and redistributed is None:
            return None
        if self.config.attention == "off":
            raise unsupported("attention", "is turned off on this server (its setting attention=off); leave it out")
        try:
            size = sum(len(tokens) for tokens, _ in prompts)
            plans = await in_thread(size, self._plans, given, prompts, messages, redistributed)
            self._check_bytes(plans, copies, 0 if redistributed is None else len(redistributed.reads))
        except ValueError as error:
            message = str(error) if str(error).startswith("attention") else f"attention: {error}"
            raise ApiError(400, message[:MAX_QUOTED], param="attention") from None
        plans = [plan for plan in plans for _ in range(copies)]
        try:
            room = self.maps.reserve(sum(map(map_bytes, plans)))
        except MapsFullError as error:
            message = f"{error}; try again when earlier maps have expired"
            raise ApiError(429, message, code="maps_full", headers={"retry-after": str(error.wait_s)}) from None
        return Readings(plans, room, self.maps, given is not None, redistributed)

    def _plans(
        self,
        given: Mapping[str, Any] | None,
        prompts: Sequence[tuple[Sequence[int], int]],
        messages: Sequence[Mapping[str, str]],
        redistributed: Redistributed | None,
    ) -> list[EditPlan]:
        """A plan for every prompt. Raises ValueError that names the field."""
        engine = self.engine.engine
        edits, reads, named = ([], [], {}) if given is None else read_field(given, self.config.attention)
        if redistributed is not None and edits:
            raise ValueError("attention.edits: the request has redistribution, too; give one of them")
        moves, told = items_of(redistributed)
        plans: list[EditPlan] = []
        for tokens, limit in prompts:
            spans, known = _placed(engine.tokenizer, tokens, named), {}
            if messages and engine.chat_template is not None:
                known = message_spans(engine.chat_template.template, engine.tokenizer, messages, tokens)
            check_size([*edits, *reads], known | spans)
            wish = AttentionWish([*edits, *moves], [*told, *reads], spans)
            plans += wish.plans(engine.model, engine.tokenizer, [tokens], [limit], [known]) or []
        return plans

    def _check_bytes(self, plans: Sequence[EditPlan], copies: int, own: int) -> None:
        """Raises ValueError for reads that return too many bytes. own: as in `inline_bytes`."""
        most = self.config.attention_max_bytes
        total = copies * sum(max(plan.cost.returned_bytes, map_bytes(plan)) for plan in plans)
        if total > most:
            raise ValueError(
                f"attention: the reads of this request return {total:,} bytes, above this server's limit of {most:,} "
                "(attention_max_bytes): name fewer layers, heads, queries or keys, or read mass or top_keys in place "
                "of a map"
            )
        for plan in plans:
            inline = inline_bytes(plan, own)
            if inline > INLINE_BYTES:
                raise ValueError(
                    f"attention: reads in the answer take up to {inline:,} bytes of a choice, above {INLINE_BYTES:,}: "
                    "name fewer layers, heads or queries, or read a map, which is a download"
                )


def read_field(given: Mapping[str, Any], allowed: str) -> tuple[Sequence[Item], Sequence[Item], dict[str, Any]]:
    """The edits, reads and spans in the field. allowed: "read" or "edit". Raises ValueError that names the field."""
    for key in given:
        if key not in KEYS:
            raise ValueError(f"attention: unknown field {key!r}{suggest(key, KEYS)}")
    edits, reads = (Edits.from_json(_listed(given, name), f"attention.{name}").items for name in ("edits", "read"))
    for index, item in enumerate(edits):
        if not isinstance(item, Edit):
            raise ValueError(f"attention.edits[{index}] is a read; move it to attention.read")
    for index, item in enumerate(reads):
        if not isinstance(item, Read):
            raise ValueError(f"attention.read[{index}] is an edit; move it to attention.edits")
    if not edits and not reads:
        raise ValueError("attention asks for nothing: give edits, or read, or leave it out")
    if edits and allowed != "edit":
        raise ValueError(
            "attention.edits: this server's attention can be read, not edited (its setting attention=read)"
        )
    return edits, reads, _spans(given.get("spans"))


def _listed(given: Mapping[str, Any], name: str) -> Any:
    """A field, nothing where it is left out or null."""
    value = given.get(name)
    return [] if value is None else value


def _spans(given: Any) -> dict[str, Any]:
    """Names of parts of the prompt: a text that stands in it, [start, stop), or a list of such pairs."""
    where = "attention.spans"
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise ValueError(f"{where}={given!r} must be an object of texts or [start, stop] by name")
    if len(given) > MAX_SPANS:
        raise ValueError(f"{where} has {len(given)} names; at most {MAX_SPANS} are possible in a request")
    found: dict[str, Any] = {}
    for name, value in given.items():
        pairs = [value] if isinstance(value, list) and value and type(value[0]) is int else value
        if not isinstance(value, str) and not (isinstance(pairs, list) and pairs and all(map(_is_pair, pairs))):
            raise ValueError(
                f"{where}.{name}={value!r} must be a text in the prompt, [start, stop], or a list of these"
            )
        found[name] = value if isinstance(value, str) else [tuple(pair) for pair in pairs]
    return found


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(each) is int for each in value)


def _placed(tokenizer: Tokenizer, tokens: Sequence[int], spans: Mapping[str, Any]) -> dict[str, Any]:
    return {name: token_spans(tokenizer, tokens, value, name) for name, value in spans.items()}


def check_size(items: Sequence[Item], spans: Mapping[str, Any]) -> None:
    """Raises ValueError for more than a plan can weigh quickly. spans: the pieces of every name that has any."""
    if len(items) > MAX_ITEMS:
        raise ValueError(f"attention has {len(items)} edits and reads; at most {MAX_ITEMS} are possible in a request")
    sinks: set[Sinks] = set()
    pieces = sum(sum(_pieces(value, spans, sinks)) for item in items for value in _positions(item))
    if pieces > MAX_PIECES:
        raise ValueError(
            f"attention names {pieces} numbers, spans and places of names; at most {MAX_PIECES} are possible: use "
            "ranges in place of single numbers, and names that stand in the prompt less often"
        )
    if len(sinks) > MAX_SINKS:
        raise ValueError(f"attention has {len(sinks)} kinds of sinks; at most {MAX_SINKS} are possible in a request")


def _positions(item: Item) -> Iterator[Any]:
    """All that an item names."""
    where: Where = item.where
    yield from (where.layers, where.heads, where.steps, where.queries, *item.key_sets().values())
    if "keys" not in item.key_sets():
        yield where.keys
    only = getattr(item, "only_heads", None)
    if isinstance(only, HeadFilter):
        yield only.of


def _pieces(value: Any, spans: Mapping[str, Any], sinks: set[Sinks]) -> Iterator[int]:
    if isinstance(value, tuple):
        for each in value:
            yield from _pieces(each, spans, sinks)
    elif isinstance(value, Except):
        yield from _pieces(value.of, spans, sinks)
    elif isinstance(value, Sinks):
        sinks.add(value)
        yield len(value.channels)
    else:
        name = value.name if isinstance(value, After) else value
        named = spans.get(name) if isinstance(name, str) else None
        yield len(named) if isinstance(named, list) else 1
