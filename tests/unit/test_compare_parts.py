"""The comparison's parts against numbers worked out by hand."""

import math

import pytest
import torch

from attnzoo.attention.segment_memory import SegmentMemory, attend_segment, read_memory, remember
from attnzoo.models import DecoderConfig, DecoderLM
from attnzoo.profiling.memory import peak_bytes
from attnzoo.tasks.recall import IGNORED, place, recall_batch
from scripts.compare.comparison import Comparison
from scripts.compare.config import QUICK, RecallConfig, parse_settings
from scripts.compare.losses import segment_losses, window_losses
from scripts.compare.measure import segment_fault
from scripts.compare.paper import SAME
from scripts.compare.recall import recall_accuracy
from scripts.compare.segments import segment_forward, without_query_history
from scripts.compare.statistics import interval, mean_interval, t_quantile
from scripts.compare.text import load_text, streams, windows
from scripts.compare.training import Accuracy, cosine, noam

VARIANTS = ["mha", "rmha", "mdha", "rcmha", "linear"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 60, encoding="utf-8")
    return path


def tiny(kind: str, positions: int = 13) -> DecoderLM:
    torch.manual_seed(0)
    config = DecoderConfig(
        vocab_size=7, model_dim=24, num_layers=2, attention=kind, max_positions=positions, mlp="relu", mlp_dim=5
    )
    return DecoderLM(config).double()


@pytest.mark.parametrize("table", ["parameters", "flops", "recall"])
def test_matched_within_one_percent(text, table):
    comparison = Comparison(parse_settings([f"text={text}"]))
    matched = comparison.matches(table)
    key = "train_flops_per_token" if table == "flops" else "parameters"
    values = [getattr(match, key) for match in matched.values()]
    assert max(values) <= 1.01 * min(values)
    for variant, match in matched.items():
        build = comparison.recall_decoder(variant, match.mlp_dim) if table == "recall" else None
        model = DecoderLM(build or comparison.decoder(variant, match.mlp_dim, 256))
        assert model.num_parameters() == match.parameters
        length = 64 if table == "recall" else 256
        assert 3 * model.cost(1, length, length).flops == match.train_flops_per_token * length


def test_matching_refuses_what_cannot_be_matched(text):
    # One more hidden unit is 2 * model_dim of few hundred weights: several per cent.
    sizes = ["model_dim=4", "num_heads=2", "num_layers=1", "segment=2", "mlp_dim=1"]
    comparison = Comparison(parse_settings([f"text={text}", *sizes]))
    with pytest.raises(ValueError, match="raise model_dim or num_layers"):
        comparison.matches("parameters")


def test_text_is_split_by_position_and_read_in_order(text):
    loaded = load_text(str(text))
    whole = text.read_text(encoding="utf-8")
    assert loaded.vocab_size == len(set(whole))
    spell = lambda ids: "".join(loaded.characters[i] for i in ids)  # noqa: E731
    assert spell(torch.cat([loaded.train, loaded.validation])) == whole
    assert len(loaded.train) == len(whole) * 9 // 10
    reader = streams(loaded.train, 3, 5, seed=4)
    first, second = next(reader), next(reader)
    assert torch.equal(first[0][:, 1:], first[1][:, :-1])
    assert torch.equal(first[1][:, -1], second[0][:, 0])
    again = next(streams(loaded.train, 3, 5, seed=4))
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], next(streams(loaded.train, 3, 5, seed=5))[0])


@pytest.mark.parametrize("count", [20, 21, 22, 23])
def test_windows_have_every_character_as_a_target_once(count):
    ids = torch.arange(count)
    targets = torch.cat([t.flatten() for _, t in windows(ids, 5, 2)])
    assert targets.tolist() == list(range(1, count))


class Constant(torch.nn.Module):
    """Says the same of every character: token 0 with probability 1/2, else 1/4 each."""

    def init_state(self, batch: int, capacity: int) -> int:
        return 0

    def extend(self, tokens_BT: torch.Tensor, state: int) -> tuple[torch.Tensor, int]:
        assert state + tokens_BT.shape[1] <= 4
        logits_V = torch.tensor([0.5, 0.25, 0.25]).log()
        return logits_V.expand(*tokens_BT.shape, 3), state + tokens_BT.shape[1]


def test_bits_and_accuracy_by_hand():
    # Targets: 0 0 1 2 | 0 1. Bits: 1 1 2 2 | 1 2, of which three were the most likely token.
    losses = window_losses(Constant(), torch.tensor([1, 0, 0, 1, 2, 0, 1]), length=4, chunk=3, batch=2)
    assert losses.bits_per_character == pytest.approx(9 / 6)
    assert losses.loss == pytest.approx(9 / 6 * math.log(2))
    assert losses.accuracy == pytest.approx(3 / 6)
    assert losses.count_T.tolist() == [2, 2, 1, 1]
    assert losses.between(0, 1) == pytest.approx(math.log(2))
    assert losses.between(2, 4) == pytest.approx(2 * math.log(2))


@pytest.mark.parametrize("kind", VARIANTS)
def test_streamed_losses_are_those_of_the_parallel_form(kind):
    model, ids = tiny(kind), torch.randint(7, (53,), generator=torch.Generator().manual_seed(3))
    streamed = window_losses(model, ids, length=13, chunk=5, batch=3)
    # The parallel form in float32 inside `loss`: hence the tolerance.
    losses = [model.loss(tokens, targets) * targets.numel() for tokens, targets in windows(ids, 13, 3)]
    assert streamed.loss == pytest.approx(sum(float(loss.detach()) for loss in losses) / 52, rel=1e-5)


def test_recall_by_hand():
    keys, values = torch.tensor([[3, 1]]), torch.tensor([[6, 5]])
    noise = torch.tensor([[9, 9, 9, 9, 0, 1, 2, 3, 4, 5]])
    tokens, targets = place(keys, values, torch.tensor([[2, 0]]), noise)
    assert tokens.tolist() == [[3, 6, 1, 5, 1, 1, 2, 3, 3, 5]]
    x = IGNORED
    assert targets.tolist() == [[x, x, x, x, 5, x, x, x, 6, x]]


def test_recall_batches_can_be_answered_and_differ():
    config = RecallConfig()
    tokens, targets = recall_batch(config, 33, torch.Generator().manual_seed(1))
    assert tokens.shape == (33, config.length)
    for row, wanted in zip(tokens.tolist(), targets.tolist(), strict=True):
        pairs = dict(zip(row[: 2 * config.pairs : 2], row[1 : 2 * config.pairs : 2], strict=True))
        assert len(pairs) == config.pairs
        asked = [place for place, target in enumerate(wanted) if target != IGNORED]
        assert len(asked) == config.pairs
        assert all(pairs[row[place]] == wanted[place] for place in asked)
    assert not torch.equal(tokens, recall_batch(config, 33, torch.Generator().manual_seed(2))[0])


def test_recall_accuracy_of_a_model_that_knows():
    config = RecallConfig(test_sequences=5, batch_size=2)

    def oracle(tokens_BT: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(*tokens_BT.shape, config.vocab_size)
        for b, row in enumerate(tokens_BT.tolist()):
            pairs = dict(zip(row[: 2 * config.pairs : 2], row[1 : 2 * config.pairs : 2], strict=True))
            for t, token in enumerate(row):
                logits[b, t, pairs.get(token, 0)] = 1.0
        return logits

    assert recall_accuracy(oracle, config) == 1.0


@pytest.mark.parametrize("kind", ["mha", "rmha", "mdha", "rcmha"])
def test_the_published_segments_are_another_function_only_where_there_is_a_convolution(kind):
    config = tiny(kind).config
    assert segment_fault(config, 2, "carried") < SAME
    fault = segment_fault(config, 2, "published")
    assert fault > 1e3 * SAME if kind in ("mdha", "rcmha") else fault < SAME


def test_the_published_query_is_convolved_with_zeros():
    # By hand: with the kernel on the token two back alone, a segment of two tokens has no query at all.
    attention = tiny("mdha").layers()[0].attention
    with torch.no_grad():
        attention.conv.query_kernel.zero_()
        attention.conv.query_kernel[..., 0] = 1.0
    past, x = torch.randn(2, 5, 24).double(), torch.randn(2, 2, 24).double()
    memory = remember(SegmentMemory.empty(2, 5, 24, dtype=torch.float64), past)
    flat, _ = attention.extend(x, without_query_history(read_memory(attention, memory, 2)))
    # No query, so all keys weigh the same: the mean of the values of memory and segment up to the token.
    with torch.no_grad():
        attention.conv.query_kernel.zero_()
    assert torch.allclose(flat, attend_segment(attention, x, memory)[0], atol=1e-12)


def test_memory_keeps_what_is_asked_and_passes_no_gradient_back():
    model = tiny("rcmha")
    tokens = torch.randint(7, (3, 8), generator=torch.Generator().manual_seed(1))
    memory = model.init_memory(3, 5)
    for piece in tokens.split(2, dim=1):
        _, memory = segment_forward(model, piece, memory, "carried")
    assert [tuple(m.hidden_BMD.shape) for m in memory] == [(3, 5, 24)] * 2
    assert not any(m.hidden_BMD.requires_grad for m in memory)
    assert torch.equal(memory[0].hidden_BMD, model.embedding(tokens[:, -5:]))
    losses = segment_losses(model, tokens[0], 2, 2, 5, "carried")
    assert losses.count_T.tolist() == [4, 4]


def test_published_accuracy_is_never_reset():
    accuracy = Accuracy()
    accuracy.add(torch.tensor([[1.0, 0.0]]))
    accuracy.add(torch.tensor([[1.0, 1.0], [1.0, 0.0]]))
    assert accuracy.value == pytest.approx(4 / 6)


def test_schedules():
    assert [cosine(step, 100, 4) for step in (0, 3)] == [0.25, 1.0]
    assert cosine(99, 100, 4) == pytest.approx(0.1)
    assert cosine(51, 100, 4) == pytest.approx(0.55)
    assert noam(1999, 2000, 128) == pytest.approx(128**-0.5 * 2000**-0.5)
    assert noam(0, 2000, 128) == pytest.approx(128**-0.5 * 2000**-1.5)


def test_intervals():
    # Two-sided 95 % quantiles of Student's t from the usual tables.
    tabled = {1: 12.706, 2: 4.3027, 3: 3.1824, 4: 2.7764, 9: 2.2622, 30: 2.0423}
    for freedom, quantile in tabled.items():
        assert t_quantile(freedom) == pytest.approx(quantile, abs=5e-4 if freedom == 1 else 5e-5)
    mean, half = mean_interval([2.0, 2.1, 2.2])
    assert (mean, half) == (pytest.approx(2.1), pytest.approx(4.3027 * 0.1 / 3**0.5, rel=1e-4))
    assert interval([2.0, 2.1, 2.2]) == "2.10 ± 0.25"
    assert interval([0.5]) == "0.5000"
    assert math.isnan(mean_interval([1.0])[1])


def test_peak_counts_what_stood_at_once():
    def call() -> None:
        a = torch.zeros(1000, dtype=torch.float32)
        b = a.clone()
        del a
        c = b.clone()
        del b, c

    # Two tensors stand at a time, never three; torch may keep a scalar beside them.
    assert 8000 <= peak_bytes(call) < 8200


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["stps=3"], "unknown key stps; did you mean 'steps'"),
        (["paper.step=3"], "did you mean 'paper.steps'"),
        (["steps"], "not of the form key=value"),
        (["steps=many"], "steps='many' must be an integer"),
        (["steps=1.5"], "steps=1.5 has type float"),
        (["steps=0"], "steps=0 must be at least 1"),
        (["lr=-1"], "lr=-1.0 must be positive"),
        (["variants=rmah"], "unknown name 'rmah' in variants; did you mean 'rmha'"),
        (["variants="], "give at least one name"),
        (["tables=paper,paper"], "each once"),
        (["recall.pairs=40"], "recall.pairs=40"),
        (["recall.length=20"], "use at least 32"),
        (["paper.table_rows=8"], "paper.table_rows=8"),
    ],
)
def test_settings_are_strict(words, message):
    with pytest.raises(ValueError, match=message.replace(".", r"\.").replace("(", r"\(")):
        parse_settings(words)


def test_settings():
    config = parse_settings(["variants=mha,rcmha", "lr=1", "paper.lr=0.5", "text=42"], QUICK)
    assert (config.variants, config.lr, config.paper.lr, config.text) == (["mha", "rcmha"], 1.0, 0.5, "42")
    assert config.paper.steps == QUICK["paper"]["steps"]
    assert type(config).from_dict(config.to_dict()) == config


def test_text_that_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match="text=PATH"):
        load_text(str(tmp_path / "none.txt"))
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(ValueError, match="at least 1000"):
        load_text(str(tmp_path / "short.txt"))
    (tmp_path / "latin.txt").write_bytes(b"\xe9" * 2000)
    with pytest.raises(ValueError, match="not UTF-8"):
        load_text(str(tmp_path / "latin.txt"))


def test_the_default_text_is_on_every_machine():
    """The command as the README has it: text enough, few characters, the same at every call."""
    comparison = Comparison(parse_settings([]))
    assert comparison.config.text == "stdlib"
    assert len(comparison.text.train) + len(comparison.text.validation) == 1_000_000
    assert 90 < comparison.text.vocab_size < 128
    assert Comparison(parse_settings([])).text_hash == comparison.text_hash
