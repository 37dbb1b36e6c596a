"""State trees: names, bytes, rows, and what is refused."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from attnzoo import attention
from attnzoo.attention.base import StreamingAttention
from attnzoo.attention.cached import compress_layers
from attnzoo.kvcache import CACHES, CacheSize, FullCache, State, build_cache, load_state, save_state
from attnzoo.kvcache.full import append
from attnzoo.ops.common.step_inputs import StepInputs


@dataclass
class Leaf(State):
    values: Tensor
    extra: Tensor | None = None


@dataclass
class Tree(State):
    layers: tuple[Leaf, ...]
    lengths: Tensor


def tree(batch: int = 3) -> Tree:
    layers = tuple(Leaf(torch.arange(batch * 4.0).view(batch, 4) + 100 * i) for i in range(2))
    return Tree(layers, torch.arange(batch))


def test_names_and_bytes():
    state = tree()
    assert list(state.tensors()) == ["layers.0.values", "layers.1.values", "lengths"]
    assert state.nbytes() == 2 * 3 * 4 * 4 + 3 * 8


def test_rows_are_views_and_clone_is_not():
    state = tree()
    copy = state.clone()
    state.rows(slice(1, 2)).layers[0].values.fill_(-1)
    assert state.layers[0].values[1].tolist() == [-1] * 4
    assert copy.layers[0].values[1].tolist() == [4, 5, 6, 7]


def test_store_and_reset():
    state, other = tree(), tree(1).map(lambda _, tensor: tensor + 1000)
    state.store(slice(2, 3), other)
    assert state.layers[1].values[2].tolist() == [1100, 1101, 1102, 1103]
    state.reset(slice(2, 3))
    assert state.lengths.tolist() == [0, 1, 0]
    assert state.layers[1].values[2].tolist() == [0] * 4


def test_store_refuses_what_has_outgrown_the_pool():
    pool, grown = tree(), tree(1)
    grown.layers[1].values = torch.zeros(1, 8)
    with pytest.raises(ValueError, match=r"state 'layers.1.values'.*larger capacity"):
        pool.store(slice(0, 1), grown)


def test_joined_sequences_stand_beside_each_other_in_the_room_of_the_longest():
    mine, added = tree(2), tree(1).map(lambda _, tensor: tensor + 1000)
    added.layers[0].values = torch.tensor([[1.0, 2, 3, 4, 5]])
    state = mine.joined(added)
    assert state.batch == 3
    assert state.layers[0].values.tolist() == [[0, 1, 2, 3, 0], [4, 5, 6, 7, 0], [1, 2, 3, 4, 5]]
    assert state.layers[1].values[2].tolist() == [1100, 1101, 1102, 1103]
    assert state.lengths.tolist() == [0, 1, 1000]


def test_rows_that_are_kept_are_in_memory_of_their_own():
    state = tree()
    before = state.layers[0].values
    kept = state.keep_rows([2, 0])
    assert kept.layers[0].values.tolist() == [[8, 9, 10, 11], [0, 1, 2, 3]]
    assert kept.lengths.tolist() == [2, 0]
    assert kept.layers[0].values.untyped_storage().nbytes() == 2 * 4 * 4
    kept.layers[0].values.fill_(-1)
    assert before[2].tolist() == [8, 9, 10, 11]


@pytest.mark.parametrize("other", [Leaf(torch.zeros(1, 4), torch.zeros(1)), Leaf(torch.zeros(1, 4).long())])
def test_states_of_different_kinds_are_not_joined(other):
    with pytest.raises(ValueError, match=r"different kinds|cannot take"):
        Leaf(torch.zeros(2, 4)).joined(other)


def test_the_state_of_a_context_is_no_other(tmp_path):
    """Kills: a running sum of a sequence for the sum of a context."""
    layer, x = attention("linear", model_dim=32, decay=False), torch.randn(1, 3, 32)
    own, of_context = layer.extend(x, layer.init_state(1, 5))[1], layer.init_context(x)
    for one, other in ((own, of_context), (of_context, own)):
        with pytest.raises(ValueError, match="states of different kinds cannot be joined"):
            one.joined(other)
        save_state(one, tmp_path / "state")
        with pytest.raises(ValueError, match="BKHH"):
            load_state(other, tmp_path / "state")


def test_states_of_other_sizes_are_not_joined():
    """Heads, channels and the model's width: zeros beside would be heads of nobody. Kills: axes that are padded."""
    mine = attention("mha", model_dim=32, num_heads=4)
    narrow = {"num_heads": 4, "head_dim": 4}
    for options, axis in (({"num_heads": 2}, "K is 4 in one and 2"), (narrow, "H is 8 in one and 4")):
        other = attention("mha", model_dim=32, **options)
        with pytest.raises(ValueError, match=rf"axis {axis} in the other; states of one model alone can be joined"):
            mine.init_state(1, 5).joined(other.init_state(1, 9))
    x = torch.zeros(1, 3, 32)
    with pytest.raises(ValueError, match="axis K is 4 in one and 2"):
        mine.init_context(x).joined(attention("mha", model_dim=32, num_heads=2).init_context(x))
    assert mine.init_state(1, 5).joined(mine.init_state(2, 9)).lengths_B.tolist() == [0, 0, 0]


def test_save_and_load(tmp_path):
    path = tmp_path / "state.safetensors"
    save_state(tree(), path)
    loaded = load_state(tree(), path)
    assert all(torch.equal(a, b) for a, b in zip(loaded.tensors().values(), tree().tensors().values(), strict=True))


def test_load_refuses_another_model(tmp_path):
    path = tmp_path / "state.safetensors"
    save_state(Leaf(torch.zeros(1, 2)), path)
    with pytest.raises(ValueError, match="not a state of this model"):
        load_state(tree(), path)
    with pytest.raises(ValueError, match=r"values is torch.float32 of rank 2"):
        load_state(Leaf(torch.zeros(1, 2, 1)), path)


def test_arguments_of_another_kind_are_named(tmp_path):
    """Kills: a whole state for a file's name; a warning of torch for rows that are a tensor."""
    with pytest.raises(
        ValueError, match=r"^load_state takes a state of init_state and then a path, and got a PosixPath"
    ):
        load_state(tmp_path, tree())  # type: ignore[type-var, arg-type]
    with pytest.raises(ValueError, match=r"^save_state takes a state and then a path, and got a PosixPath"):
        save_state(tmp_path, tree())  # type: ignore[arg-type]
    assert tree().keep_rows(torch.tensor([2, 0])).lengths.tolist() == [2, 0]
    layer = attention("mha", model_dim=32)
    for dtype in (torch.int64, torch.complex64, "bf16"):
        with pytest.raises(ValueError, match=r"dtype=.* must be a floating-point torch.dtype, such as torch.float32"):
            layer.init_state(2, 5, dtype=dtype)


LAYERS = [
    (name, case)
    for name in attention.ATTENTION
    if issubclass(attention.ATTENTION.get(name), StreamingAttention)
    for case in attention.ATTENTION.get(name).cases
]


@pytest.mark.parametrize(("name", "case"), LAYERS, ids=str)
@torch.no_grad()
def test_a_state_may_be_kept_in_another_dtype(name, case):
    """Keys and values in fewer or more digits than the weights, which halves a cache in memory, in chunks, by tokens,
    and joined; states keep their dtypes. Kills: a state that can be made and not extended."""
    layer = attention.build_attention(name, {"model_dim": 24, **case})
    x = torch.randn(2, 9, 24)
    whole = layer(x)
    for dtype, allowed in ((torch.bfloat16, 3e-2), (torch.float16, 3e-3), (torch.float64, 1e-4)):
        state = layer.init_state(2, 4, dtype=dtype)
        kinds = {key: value.dtype for key, value in state.tensors().items()}
        outs, done = [], 0
        for end in (4, 5, 9):
            y, state = layer.extend(x[:, done:end], state, torch.tensor([end - done] * 2))
            outs, done = [*outs, y], end
        y = torch.cat(outs, 1)
        assert y.dtype == whole.dtype
        torch.testing.assert_close(y, whole, rtol=allowed, atol=allowed * float(whole.abs().max()))
        assert {key: value.dtype for key, value in state.tensors().items()} == kinds
        state.joined(layer.init_state(1, 4, dtype=dtype))


@pytest.mark.parametrize("name", list(CACHES))
@torch.no_grad()
def test_caches_may_be_kept_in_another_dtype(name):
    layer = attention.build_attention("mdha", {"model_dim": 24, "num_heads": 3})
    if name != "full":
        relative = attention.build_attention("rmha", {"model_dim": 24})
        with pytest.raises(ValueError, match=r"dtype=torch.bfloat16: .* of a layer with learned positions is kept in"):
            relative.init_state(1, 9, dtype=torch.bfloat16, cache=build_cache(name))
    x = torch.randn(2, 40, 24)
    outs = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        state = layer.init_state(2, 40, dtype=dtype, cache=build_cache(name))
        y, state = layer.extend(x[:, :30], state)
        (state,) = compress_layers([layer], [state], final=True)
        z, state = layer.extend(x[:, 30:31], state)
        outs[dtype] = torch.cat([y, z], 1)
        assert outs[dtype].dtype == torch.float32
    torch.testing.assert_close(outs[torch.float64], outs[torch.float32], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(outs[torch.bfloat16], outs[torch.float32], rtol=0.1, atol=0.1)


@pytest.mark.parametrize(("name", "case"), LAYERS, ids=str)
def test_a_state_of_inference_mode_goes_on_outside_of_it(name, case):
    """Kills: torch's refusal to write into its tensors."""
    layer = attention.build_attention(name, {"model_dim": 24, **case})
    x = torch.randn(2, 6, 24)
    with torch.inference_mode():
        _, state = layer.extend(x[:, :3], layer.init_state(2, 9))
    kept = {key: value.clone() for key, value in state.tensors().items()}
    with torch.no_grad():
        y, later = layer.extend(x[:, 3:5], state)
        z, _ = layer.extend(x[:, 5:], later)
    torch.testing.assert_close(torch.cat([y, z], 1), layer(x)[:, 3:], rtol=1e-4, atol=1e-5)
    assert all(torch.equal(value, kept[key]) for key, value in state.tensors().items())


def test_full_cache_grows_by_doubling_and_counts_its_bytes():
    cache = FullCache()
    size = CacheSize(1, 2, 2, 3, torch.float32)
    state = cache.init(size, 4)
    assert state.nbytes() == cache.nbytes(size, 4) == 2 * 2 * 4 * 3 * 4
    capacities = set()
    for t in range(20):
        keys = torch.full((1, 2, 1, 3), float(t))
        state, view = append(state, keys, keys, StepInputs.of(torch.tensor([t]), 1))
        capacities.add(state.keys_BKSH.shape[2])
        assert view.positions_BKS.tolist() == [[list(range(t + 1))]]
        assert view.keys_BKSH[0, 1, :, 2].tolist() == list(range(t + 1))
    assert capacities == {4, 8, 16, 32}


@pytest.mark.parametrize("kind", ["mha", "rmha", "rcmha"])
def test_rows_that_end_together_may_have_begun_apart(kind):
    """A prompt's last tokens beside a whole prompt of the same length: both rows then end at one position."""
    layer = attention.build_attention(kind, {"model_dim": 12, "num_heads": 3}).double().requires_grad_(False)
    x_BTD = torch.randn(2, 13, 12, dtype=torch.float64)
    state = layer.init_state(2, 29)
    _, state = layer.extend(x_BTD[:, :11], state, torch.tensor([11, 0]))
    chunk_BTD = torch.zeros_like(x_BTD)
    chunk_BTD[0, :2], chunk_BTD[1] = x_BTD[0, 11:], x_BTD[1]
    y_BTD, state = layer.extend(chunk_BTD, state, torch.tensor([2, 13]))
    whole_BTD = layer(x_BTD)
    torch.testing.assert_close(y_BTD[0, :2], whole_BTD[0, 11:])
    torch.testing.assert_close(y_BTD[1], whole_BTD[1])
    token_B1D = torch.randn(2, 1, 12, dtype=torch.float64)
    last_B1D, _ = layer.extend(token_B1D, state)
    torch.testing.assert_close(last_B1D, layer(torch.cat([x_BTD, token_B1D], 1))[:, -1:])
