"""Masks by hand: documents, padding, windows, and what is refused."""

import pytest
import torch

from attnzoo.ops.common.impl import choose
from attnzoo.ops.common.masks import CausalMask, document_starts, marked_starts, padding_starts


def seen(mask: CausalMask, tokens: int) -> list[str]:
    return ["".join("x" if v else "." for v in row) for row in mask.visible(tokens, torch.device("cpu"))[0, 0]]


def test_window_and_sinks():
    assert seen(CausalMask(window=2), 4) == ["x...", "xx..", ".xx.", "..xx"]
    assert seen(CausalMask(window=1, sinks=1), 4) == ["x...", "xx..", "x.x.", "x..x"]


def test_documents_and_their_sinks():
    starts = document_starts(torch.tensor([0, 2, 5]), 1, 5)
    assert starts.tolist() == [[0, 0, 2, 2, 2]]
    assert seen(CausalMask(starts_BT=starts), 5) == ["x....", "xx...", "..x..", "..xx.", "..xxx"]
    assert seen(CausalMask(starts_BT=starts, window=1, sinks=1), 5) == ["x....", "xx...", "..x..", "..xx.", "..x.x"]


def test_a_document_that_crosses_rows_starts_anew():
    assert document_starts(torch.tensor([0, 2, 5, 8]), 2, 4).tolist() == [[0, 0, 2, 2], [0, 1, 1, 1]]


def test_empty_documents_change_nothing():
    assert document_starts(torch.tensor([0, 2, 2, 4]), 1, 4).tolist() == [[0, 0, 2, 2]]


def test_padding():
    lengths = torch.tensor([2, 4])
    assert padding_starts(lengths, 4, "right").tolist() == [[0, 0, 2, 3], [0, 0, 0, 0]]
    assert padding_starts(lengths, 4, "left").tolist() == [[0, 1, 2, 2], [0, 0, 0, 0]]


def test_marked_documents():
    tokens = torch.tensor([[7, 1, 5, 1, 1, 6], [1, 2, 3, 4, 5, 6]])
    assert marked_starts(tokens, 1).tolist() == [[0, 1, 1, 3, 4, 4], [0, 0, 0, 0, 0, 0]]


def test_streaming_positions_and_sinks():
    mask = CausalMask(
        window=2,
        sinks=1,
        query_positions_BT=torch.tensor([[5]]),
        key_positions_BKS=torch.tensor([[[-1, 0, 3, 4, 5, 6]]]),
    )
    assert mask.visible(1, torch.device("cpu"))[0, 0, 0].tolist() == [False, True, False, True, True, False]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window=0 must be at least 1"),
        ({"sinks": -1}, "sinks=-1 must be at least 0"),
        ({"sinks": 2}, "sinks=2 without a window"),
        ({"query_positions_BT": torch.zeros(1, 1)}, "come together"),
    ],
)
def test_refused_masks(options, message):
    with pytest.raises(ValueError, match=message):
        CausalMask(**options)


def test_refused_lengths():
    with pytest.raises(ValueError, match=r"cu_seqlens=\[0, 3\] must rise from 0 to batch \* tokens = 1 \* 4 = 4"):
        document_starts(torch.tensor([0, 3]), 1, 4)
    with pytest.raises(ValueError, match=r"must rise"):
        document_starts(torch.tensor([0, 3, 2, 4]), 1, 4)
    with pytest.raises(ValueError, match=r"lengths \[5\] must lie between 0 and the 4 tokens"):
        padding_starts(torch.tensor([5]), 4, "left")
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
