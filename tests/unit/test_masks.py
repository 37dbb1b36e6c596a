"""Masks by hand: documents, padding, windows, and what is refused."""

import pytest
import torch

from attnzoo.ops.common.impl import choose
from attnzoo.ops.common.masks import Mask, check_mask, document_starts, marked_starts, padding_keys, padding_starts

LONG, SOME = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1, dtype=torch.bool)
PLACES = {"query_positions_BT": LONG, "key_positions_BKS": LONG[None]}


def seen(mask: Mask, tokens: int, entries: int | None = None, row: int = 0, head: int = 0) -> list[str]:
    visible = mask.visible(tokens, tokens if entries is None else entries, torch.device("cpu"))
    return ["".join("x" if v else "." for v in line) for line in visible[row, head]]


def test_window_and_sinks():
    assert seen(Mask(window=2), 4) == ["x...", "xx..", ".xx.", "..xx"]
    assert seen(Mask(window=1, sinks=1), 4) == ["x...", "xx..", "x.x.", "x..x"]


def test_documents_and_their_sinks():
    starts = document_starts(torch.tensor([0, 2, 5]), 1, 5)
    assert starts.tolist() == [[0, 0, 2, 2, 2]]
    assert seen(Mask(starts_BT=starts), 5) == ["x....", "xx...", "..x..", "..xx.", "..xxx"]
    assert seen(Mask(starts_BT=starts, window=1, sinks=1), 5) == ["x....", "xx...", "..x..", "..xx.", "..x.x"]


def test_a_document_that_crosses_rows_starts_anew():
    assert document_starts(torch.tensor([0, 2, 5, 8]), 2, 4).tolist() == [[0, 0, 2, 2], [0, 1, 1, 1]]


def test_empty_documents_change_nothing():
    assert document_starts(torch.tensor([0, 2, 2, 4]), 1, 4).tolist() == [[0, 0, 2, 2]]


def test_padding():
    lengths = torch.tensor([2, 4])
    assert padding_starts(lengths, 4, "right").tolist() == [[0, 0, 2, 3], [0, 0, 0, 0]]
    assert padding_starts(lengths, 4, "left").tolist() == [[0, 1, 2, 2], [0, 0, 0, 0]]


def test_padded_keys():
    lengths = torch.tensor([2, 3, 0])
    assert padding_keys(lengths, 3, "right").int().tolist() == [[1, 1, 0], [1, 1, 1], [0, 0, 0]]
    assert padding_keys(lengths, 3, "left").int().tolist() == [[0, 1, 1], [1, 1, 1], [0, 0, 0]]


def test_full_and_keys_that_exist():
    keys = torch.tensor([[True, False, True]])
    assert seen(Mask.full(), 2, 3) == ["xxx", "xxx"]
    assert seen(Mask.full(keys), 2, 3) == ["x.x", "x.x"]
    assert seen(Mask(keys_BS=~keys), 3) == ["...", ".x.", ".x."]


def test_a_prefix_sees_itself_and_what_follows_is_causal():
    prefix = torch.tensor([3, 1])
    assert seen(Mask(prefix_B=prefix), 5) == ["xxx..", "xxx..", "xxx..", "xxxx.", "xxxxx"]
    assert seen(Mask(prefix_B=prefix), 3, row=1) == seen(Mask(), 3)
    assert seen(Mask(prefix_B=prefix, window=2), 5) == ["xxx..", "xxx..", "xxx..", "..xx.", "...xx"]
    assert seen(Mask(prefix_B=prefix, window=1, sinks=1), 5) == ["xxx..", "xxx..", "xxx..", "x..x.", "x...x"]
    holes = torch.tensor([[True, False, True, True, True], [True] * 5])
    assert seen(Mask(prefix_B=prefix, keys_BS=holes), 5) == ["x.x..", "x.x..", "x.x..", "x.xx.", "x.xxx"]


def test_pairs_add_to_what_the_rest_says():
    pairs = torch.tensor([[[1, 0], [1, 1], [0, 0]], [[1, 1], [0, 1], [1, 1]]]).bool()
    assert seen(Mask.full(pairs=pairs[:1]), 3, 2) == ["x.", "xx", ".."]
    assert seen(Mask.full(torch.tensor([[False, True]]), pairs[None]), 3, 2, head=1) == [".x", ".x", ".x"]
    assert seen(Mask(pairs=pairs[None, :, :2]), 2, head=1) == ["x.", ".x"]


def test_streaming_positions_of_a_prefix_and_of_all():
    where = {"query_positions_BT": torch.tensor([[1, 4]]), "key_positions_BKS": torch.tensor([[[-1, 5, 0, 2, 4]]])}
    assert seen(Mask(causal=False, **where), 2, 5) == [".xxxx", ".xxxx"]
    assert seen(Mask(prefix_B=torch.tensor([3]), **where), 2, 5) == ["..xx.", "..xxx"]


def test_how_far_keys_may_be():
    """(behind, ahead): what tables by distance must reach."""
    where = {"query_positions_BT": torch.tensor([[1, 4]]), "key_positions_BKS": torch.tensor([[[-1, 5, 0]]])}
    prefix = torch.tensor([3, 1])
    masks = {(4, 0): Mask(), (4, 6): Mask.full(), (4, 2): Mask(prefix_B=prefix), (4, 5): Mask(causal=False, **where)}
    assert [mask.reach(5, 7) for mask in masks.values()] == list(masks)
    assert Mask(prefix_B=prefix, **where).reach(2, 3) == (4, 2)
    assert Mask(**where).reach(2, 3) == (4, 0)


def test_queries_that_see_nothing_are_opened_and_told():
    """No softmax meets a row of nothing; the rest of the mask is as it was."""
    mask = Mask(keys_BS=torch.tensor([[False, True], [True, True]]))
    visible, empty = mask.opened(2, 2, torch.device("cpu"))
    assert empty is not None
    assert empty.flatten().tolist() == [True, False, False, False]
    assert visible.flatten(0, 2).tolist() == [[True, True], [False, True], [True, False], [True, True]]
    assert Mask().opened(2, 2, torch.device("cpu"))[1] is None
    bias, _ = mask.bias(2, 2, torch.device("cpu"), torch.float32)
    assert bias.isneginf().equal(~visible)


def test_marked_documents():
    tokens = torch.tensor([[7, 1, 5, 1, 1, 6], [1, 2, 3, 4, 5, 6]])
    assert marked_starts(tokens, 1).tolist() == [[0, 1, 1, 3, 4, 4], [0, 0, 0, 0, 0, 0]]


def test_streaming_positions_and_sinks():
    mask = Mask(
        window=2,
        sinks=1,
        query_positions_BT=torch.tensor([[5]]),
        key_positions_BKS=torch.tensor([[[-1, 0, 3, 4, 5, 6]]]),
    )
    assert mask.visible(1, 6, torch.device("cpu"))[0, 0, 0].tolist() == [False, True, False, True, True, False]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window=0 must be at least 1"),
        ({"sinks": -1}, "sinks=-1 must be at least 0"),
        ({"sinks": 2}, "sinks=2 without a window"),
        ({"query_positions_BT": torch.zeros(1, 1)}, "come together"),
        ({"causal": False, "window": 3}, "causal=False shows keys after the query, which window cannot join"),
        ({"causal": False, "prefix_B": LONG, "starts_BT": LONG}, "which prefix_B and starts_BT cannot join"),
        ({"prefix_B": LONG, "starts_BT": LONG}, "prefix_B counts from the first position of a row, which starts_BT"),
        ({**PLACES, "keys_BS": SOME}, "positions hide keys by position -1, which keys_BS cannot join"),
        ({**PLACES, "pairs": SOME}, "which pairs cannot join: leave one of them out"),
        ({"keys_BS": LONG}, "keys_BS has dtype torch.int64; it must be bool"),
        ({"pairs": LONG}, "pairs has dtype torch.int64; it must be bool"),
        ({"keys_BS": [[True]]}, "keys_BS has dtype of a list, and is no tensor; it must be bool"),
        ({"starts_BT": [[0]]}, "starts_BT has dtype of a list, and is no tensor; it must be int64"),
        ({"prefix_B": torch.ones(1)}, "prefix_B has dtype torch.float32; it must be int64"),
    ],
)
def test_refused_masks(options, message):
    with pytest.raises(ValueError, match=message):
        Mask(**options)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (Mask(), "3 queries and 4 keys: a causal mask of the parallel form needs as many"),
        (Mask.full(SOME), r"keys_BS has shape \(1, 1\); it must be \(2, 4\)"),
        (Mask.full(pairs=SOME), r"pairs has shape \(1, 1\); it must be \(2, 3, 4\) or \(2, 5, 3, 4\)"),
        (Mask(starts_BT=torch.full((2, 4), -3)), "starts_BT is -3 somewhere; it counts tokens, from 0 on"),
        (Mask.full(torch.ones(2, 4).bool(), pairs=SOME), r"pairs has shape"),
        (Mask(prefix_B=LONG, **PLACES), r"prefix_B has shape \(1, 1\); it must be \(2,\)"),
    ],
)
def test_masks_that_do_not_fit(mask, message):
    tokens = 3 if mask.starts_BT is None else 4
    with pytest.raises(ValueError, match=message):
        check_mask(mask, torch.zeros(2, 5, tokens, 6), torch.zeros(2, 5, 4, 6))


def test_refused_lengths():
    with pytest.raises(ValueError, match=r"cu_seqlens=\[0, 3\] must rise from 0 to batch \* tokens = 1 \* 4 = 4"):
        document_starts(torch.tensor([0, 3]), 1, 4)
    with pytest.raises(ValueError, match=r"must rise"):
        document_starts(torch.tensor([0, 3, 2, 4]), 1, 4)
    with pytest.raises(ValueError, match=r"lengths \[5\] must lie between 0 and the 4 tokens"):
        padding_starts(torch.tensor([5]), 4, "left")
    for call, name in (
        (lambda: padding_starts([3], 7, "left"), "lengths_B has dtype of a list"),
        (lambda: padding_keys(torch.tensor([3.0, 7.0]), 7, "right"), "lengths_B has dtype torch.float32"),
        (lambda: document_starts([0, 3], 1, 3), "cu_seqlens has dtype of a list, and is no tensor; it must be int64"),
        (lambda: marked_starts([[1, 2]], 1), "tokens_BT has dtype of a list"),
    ):
        with pytest.raises(ValueError, match=name):
            call()
    with pytest.raises(ValueError, match="side='up' is not 'left' or 'right'"):
        padding_starts(torch.tensor([2]), 4, "up")  # type: ignore[arg-type]


def test_triton_on_a_cpu_is_refused_without_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("attnzoo.ops.common.impl._has_triton", lambda: True)
    with pytest.raises(ValueError, match="sdpa with impl='triton' on a CPU: use impl='torch' or 'auto'"):
        choose("sdpa", "triton", {"torch": print, "triton": print}, torch.zeros(1))


def test_triton_is_refused_where_it_is_not_installed(monkeypatch):
    monkeypatch.setattr("attnzoo.ops.common.impl._has_triton", lambda: False)
    with pytest.raises(ValueError, match="the package triton is not installed; pip install triton"):
        choose("sdpa", "triton", {"torch": print, "triton": print}, torch.zeros(1))
