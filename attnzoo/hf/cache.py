"""A `DecoderState` as the cache that `generate` of transformers hands from step to step."""

from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from attnzoo.models.decoder_lm import DecoderState


class DecoderCache(Cache):
    """state: the model's state, None before the first chunk. real_BS (bool): which columns so far are not padding.

    Its length counts columns, padding included, as transformers does; rows of the state count their tokens only. Rows
    can be selected and repeated, which beam search needs; tokens cannot be removed from a state.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.state: DecoderState | None = None
        self.real_BS: Tensor | None = None

    def append(self, state: DecoderState, real_BT: Tensor) -> None:
        """Keeps the state after a chunk. real_BT (bool): which columns of the chunk hold tokens."""
        self.state = state
        self.real_BS = real_BT if self.real_BS is None else torch.cat([self.real_BS, real_BT], dim=1)

    def __len__(self) -> int:
        return 0 if self.state is None else len(self.state.layers)

    def __repr__(self) -> str:
        return f"DecoderCache(layers={len(self)}, columns={self.get_seq_length()})"

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns seen so far, padding included."""
        return 0 if self.real_BS is None else self.real_BS.shape[1]

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: no largest length, as a state grows."""
        return -1

    @property
    def batch_size(self) -> int:
        return -1 if self.real_BS is None else len(self.real_BS)

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_initialized(self) -> bool:
        return self.state is not None

    @property
    def is_croppable(self) -> bool:
        return False

    @property
    def is_linear(self) -> list[bool]:
        """Without a False in this list, transformers would assume that the cache has no length."""
        return [False]

    def reset(self) -> None:
        """Empties the cache."""
        self.state = self.real_BS = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes a copy of row beam_idx[i]."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps these rows, in this order."""
        if self.state is not None and self.real_BS is not None:
            self.state = self.state.map(lambda _, tensor: tensor.index_select(0, indices.to(tensor.device)))
            self.real_BS = self.real_BS.index_select(0, indices.to(self.real_BS.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row `repeats` times."""
        if self.real_BS is not None:
            rows = torch.arange(len(self.real_BS), device=self.real_BS.device)
            self.batch_select_indices(rows.repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        _refuse("crop", "tokens cannot be removed from a state; generate again from the shorter text")

    def activate_past_recording(self) -> None:
        _refuse("activate_past_recording", "assisted generation removes tokens, which a state cannot do")

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> NoReturn:
        _refuse("update", "a state holds more than keys and values; only AttnzooForCausalLM extends it")

    def early_initialization(self, *args: Any, **kwargs: Any) -> None:
        _refuse("early_initialization", "the model creates the state at the first chunk")


def _refuse(method: str, why: str) -> NoReturn:
    raise ValueError(f"DecoderCache.{method} is not supported: {why}")
