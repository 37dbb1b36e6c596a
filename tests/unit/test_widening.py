"""Products of many rows in float32 with weights in bfloat16: nearer to float32, the same bits whatever is kept or read
beside, and nothing changed for few rows."""

import random

import pytest
import torch

from attnzoo.checkpoint import save_model
from attnzoo.models import CompiledDecode, DecoderLM, can_pack, pack_weights, widen_products
from attnzoo.models.packing import PackedLinear
from attnzoo.models.widening import MANY, product_times
from attnzoo.profiling.memory import peak_bytes
from serve import prompt_dtype
from serve.config import EngineConfig, ServeConfig
from serve.engine import Engine
from serve.loading import in_effect
from serve.pools import SlotPool
from serve.runner import _batches
from serve.scheduling import Chunk
from tests.helpers.engines import greedy, run_staggered
from tests.helpers.serving import TOKENS, llama_like, small_model, tokenizer

HALF = torch.bfloat16
ROWS, CELL = 6, 8
FORMS = ["plain", "packed"]


def made(form: str, rows: int | None, **changes) -> DecoderLM:
    model = llama_like(HALF, max_positions=200, **changes)
    if form == "packed":
        if not can_pack(model):
            pytest.skip("this CPU has no packed products of bfloat16")
        pack_weights(model)
    return model if rows is None else widen_products(model, rows)


def tokens_of(batch: int, count: int) -> torch.Tensor:
    return torch.randint(77, (batch, count), generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def logits_of(model: DecoderLM, tokens: torch.Tensor, chunk: int) -> torch.Tensor:
    """Of all tokens, read in chunks."""
    state, out = model.init_state(len(tokens), tokens.shape[1]), []
    for piece in tokens.split(chunk, dim=1):
        found, state = model.extend(piece, state)
        out.append(found)
    return torch.cat(out, dim=1)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mlp", ["swiglu", "gelu"])
def test_logits_are_nearer_to_those_of_float32(form, mlp):
    """Of the same weights: what is left are the roundings between maps."""
    options = {"model_dim": 96, "num_layers": 4, "mlp": mlp}
    tokens = tokens_of(4, 128)
    exact = llama_like(HALF, max_positions=200, **options).float()(tokens)
    errors = [
        float((logits_of(made(form, rows, **options), tokens, 64).float() - exact).square().mean())
        for rows in (None, MANY)
    ]
    assert errors[1] < 0.9 * errors[0]


@pytest.mark.parametrize("form", FORMS)
def test_few_rows_and_one_token_of_many_sequences_are_computed_as_before(form):
    tokens = tokens_of(3 * ROWS, ROWS - 1)
    for chunk in (1, ROWS - 1):
        assert torch.equal(*(logits_of(made(form, rows), tokens, chunk) for rows in (None, ROWS)))
    longer = tokens_of(2, 3 * ROWS)
    assert not torch.equal(*(logits_of(made(form, rows), longer, 3 * ROWS) for rows in (None, ROWS)))


@pytest.mark.parametrize("form", FORMS)
def test_nothing_stays_in_float32(form):
    model = made(form, ROWS)
    assert {p.dtype for p in model.parameters()} == {HALF}
    assert {t.dtype for t in model.init_state(1, 8).tensors().values() if t.is_floating_point()} == {HALF}
    with torch.inference_mode():
        hidden, state = model.extend_hidden(tokens_of(1, 20), model.init_state(1, 20))
    assert hidden.dtype == HALF
    assert {t.dtype for t in state.tensors().values() if t.is_floating_point()} == {HALF}


@pytest.mark.parametrize("form", FORMS)
def test_a_product_takes_four_bytes_for_each_number_of_its_weight_in_passing(form):
    """Beside its input and output in float32, and oneDNN's notes; a second copy would not fit."""
    down = made(form, ROWS, model_dim=96, mlp_dim=4096).layers()[0].mlp.down
    assert isinstance(down, PackedLinear) == (form == "packed")
    x = torch.randn(1, ROWS, 4096).to(HALF)
    with torch.inference_mode():
        down(x)
        assert peak_bytes(lambda: down(x)) <= 1.5 * 4 * (96 * 4096 + ROWS * 4096 + ROWS * 96)


@pytest.mark.heavy
def test_a_compiled_step_is_the_same():
    tokens = tokens_of(2, 40)
    models = [made("packed", rows) for rows in (None, ROWS)]
    with torch.inference_mode():
        _, state = models[0].extend_hidden(tokens, models[0].init_state(2, 64))
        hidden = [CompiledDecode(model)(tokens[:, :1], state.clone())[0] for model in models]
    assert torch.equal(*hidden)


def engine_of(kind: str, kept: bool, **settings) -> Engine:
    settings = {"prefix_mib": 8 if kept else 0, "prefix_cell": CELL, "max_batched_tokens": 40, **settings}
    config = EngineConfig(checkpoint="none", itl_target_ms=None, max_queue=100, max_num_seqs=4, **settings)
    return Engine(config, model=widen_products(small_model(kind).to(HALF), ROWS), tokenizer=tokenizer())


@pytest.mark.parametrize("kind", ["mha", "rcmha", "linear", "mixed"])
@pytest.mark.parametrize("cache", [None, {"policy": "d2o", "max_tokens": 20}], ids=str)
def test_what_is_kept_of_prompts_changes_no_bit(kind, cache):
    """Last chunks have more and fewer tokens than are computed in float32."""
    if kind == "linear" and cache:
        return
    draw = random.Random(0)
    start = [draw.randrange(3, TOKENS) for _ in range(50)]
    work = [start[:end] for end in (11, 21, 22, 23, 31, 35, 38, 45, 46)] + [start[:20] + start[:n] for n in (4, 9)]
    found = []
    for kept in (True, False):
        engine = engine_of(kind, kept)
        out = [engine.generate([prompt], greedy(4, logprobs=20), cache=cache)[0] for prompt in work]
        found.append([(o.tokens, o.logprobs) for o in out])
        assert (sum(o.last.cached_tokens for o in out) > 100) == kept
    assert found[0] == found[1]


def test_how_a_chunk_is_computed_does_not_depend_on_its_neighbours(monkeypatch):
    """Requests that arrive and are set aside at random, with and without what is kept."""
    seen, inner = set(), SlotPool.prefill

    def prefill(self, prompts, noted):
        seen.add((len(prompts) > 1, *{chunk.count >= ROWS for chunk, _ in prompts}))
        return inner(self, prompts, noted)

    monkeypatch.setattr(SlotPool, "prefill", prefill)
    draw = random.Random(3)
    start = [draw.randrange(3, TOKENS) for _ in range(24)]
    work = [(start[: draw.randrange(3, 25)] + [draw.randrange(3, TOKENS)] * 5, greedy(3)) for _ in range(40)]
    for kept in (True, False):
        run_staggered(engine_of("mha", kept), work, moves=0.2)
    assert seen == {(False, True), (False, False), (True, True), (True, False)}


def test_long_and_short_chunks_are_computed_apart():
    cache = Engine(EngineConfig(checkpoint="none"), model=small_model("mha"), tokenizer=tokenizer()).caches.default
    chunks = [Chunk(str(slot), cache, slot, 0, count, last=True) for slot, count in enumerate((7, 5, 4, 8, 6))]

    def counts(many: int | None) -> list[list[int]]:
        return [[chunk.count for chunk in batch] for batch in _batches(chunks, many)]

    assert counts(None) == [[7, 5, 4, 8, 6]]
    assert counts(6) == [[7], [5, 4], [8, 6]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(save_model(tmp_path_factory.mktemp("half"), small_model("mha").to(HALF), tokenizer=tokenizer()))


@pytest.mark.parametrize(("own", "wide", "many"), [(2.0, 1.0, MANY), (1.0, 0.95, None), (1.0, 2.0, None)])
def test_the_faster_one_is_taken_and_said_once(own, wide, many, checkpoint, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(prompt_dtype, "product_times", lambda model: (own, wide))
    engine = Engine(EngineConfig(checkpoint=checkpoint))
    assert engine.model.many_rows == many
    said = [r.message for r in caplog.records if "prompts are computed" in r.message]
    assert len(said) == 1
    assert f"computed in {'float32' if many else 'bfloat16'}:" in said[0]
    told = in_effect(engine.model, EngineConfig(checkpoint=checkpoint, threads=3, prompt_lookup=2))
    assert (told["dtype"], told["prompt_dtype"]) == ("bfloat16", "float32" if many else "bfloat16")
    assert (told["threads"], told["prompt_lookup"], told["compile_decode"]) == (3, 2, False)


@pytest.mark.parametrize(("asked", "many"), [("float32", MANY), ("bfloat16", None), ("bf16", None)])
def test_what_is_asked_for_is_not_measured(asked, many, checkpoint, monkeypatch):
    monkeypatch.setattr(prompt_dtype, "product_times", None)
    assert Engine(EngineConfig(checkpoint=checkpoint, prompt_dtype=asked)).model.many_rows == many


def test_where_there_is_no_choice_nothing_is_measured(checkpoint, monkeypatch):
    monkeypatch.setattr(prompt_dtype, "product_times", None)
    for options in ({"dtype": "float32"}, {"dtype": "float32", "prompt_dtype": "float32"}):
        assert Engine(EngineConfig(checkpoint=checkpoint, **options)).model.many_rows is None
    given = small_model("mha").to(HALF)
    assert Engine(EngineConfig(checkpoint="none"), model=given, tokenizer=tokenizer()).model.many_rows is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_dtype": "fast"}, "prompt_dtype='fast' is not known; give auto, float32, or"),
        ({"prompt_dtype": "bfloat16", "dtype": "float32"}, "too: dtype=bfloat16"),
        ({"prompt_dtype": "float16"}, "prompt_dtype='float16' with weights in bfloat16"),
        ({"prompt_dtype": "float32", "dtype": "float64"}, "products of weights in float64 on cpu are not computed in"),
    ],
)
def test_refused(options, message, checkpoint):
    with pytest.raises(ValueError, match=message):
        Engine(EngineConfig(checkpoint=checkpoint, **options))
    with pytest.raises(ValueError, match="are not widened; leave them"):
        widen_products(small_model("mha"))


def test_settings_are_refused_before_anything_is_read():
    with pytest.raises(ValueError, match="prompt_dtype='bfloat16' with weights in float32"):
        ServeConfig(checkpoint="none", dtype="float32", prompt_dtype="bfloat16")


@pytest.mark.parametrize("form", FORMS)
def test_a_measurement_leaves_the_model_as_it_was(form):
    model, tokens = made(form, None), tokens_of(1, 40)
    before = logits_of(model, tokens, 40)
    assert all(0 < seconds < 10 for seconds in product_times(model))
    assert torch.equal(logits_of(model, tokens, 40), before)
    assert model.many_rows is None
