"""What a sequence leaves behind for its next token: trees of tensors with the batch axis first.

A `State` is a dataclass whose fields are tensors, other states, tuples of states, or None; what else it knows and
tensors do not hold (its policy) is a field with the metadata `STATIC`, which is passed on as it is and never saved.
Because every tensor has the batch as its first axis, a server can hold one batched state and let sequences join and
leave by rows, without knowing what an attention variant keeps (keys and values, convolution tails, a matrix, ...).

States are consumed: `extend` may write into the buffers of the state it is given when autograd is off.
`clone()` first to continue one state in two ways.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

S = TypeVar("S", bound="State")


STATIC = {"static": True}
"""Metadata of a dataclass field that is no part of the tree: states made from this one share its value."""


class State:
    """Base of all states. Subclasses are dataclasses of Tensor | State | tuple[State, ...] | None."""

    def map(self: S, fn: Callable[[str, Tensor], Tensor]) -> S:
        """A state of the same structure with `fn(name, tensor)` for each tensor; names look like "layers.0.keys"."""
        return _map(self, "", fn)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by their names."""
        found: dict[str, Tensor] = {}

        def collect(name: str, tensor: Tensor) -> Tensor:
            found[name] = tensor
            return tensor

        self.map(collect)
        return found

    def nbytes(self) -> int:
        """Bytes of all tensors as allocated (whole capacity, masks, indices and tails included)."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def rows(self: S, index: slice) -> S:
        """Views of the sequences in `index`: no copy, and in-place writes of `extend` reach the whole."""
        return self.map(lambda _, tensor: tensor[index])

    def clone(self: S) -> S:
        """An independent copy: the way to continue one state in two ways."""
        return self.map(lambda _, tensor: tensor.clone())

    def store(self: S, index: slice, other: S) -> None:
        """Writes `other` (a state of those rows) into the rows `index` of this one, in place.

        Tensors of `other` that already live in these rows (keys and values that `extend` wrote in place) cost
        nothing. Raises ValueError when shapes differ, for example when `other` has grown past this capacity.
        """
        mine, theirs = self.tensors(), other.tensors()
        for name, target in mine.items():
            rows, source = target[index], theirs[name]
            if rows.shape != source.shape:
                raise ValueError(
                    f"state {name!r}: rows of shape {tuple(rows.shape)} cannot hold {tuple(source.shape)}; "
                    "allocate the state with a larger capacity"
                )
            if rows.data_ptr() != source.data_ptr():
                rows.copy_(source)

    def reset(self, index: slice) -> None:
        """Empties the sequences in `index`, in place: every variant's empty state is all zeros."""
        for tensor in self.tensors().values():
            tensor[index].zero_()


def _map(node: Any, name: str, fn: Callable[[str, Tensor], Tensor]) -> Any:
    if isinstance(node, Tensor):
        return fn(name, node)
    if isinstance(node, tuple):
        return tuple(_map(item, f"{name}.{i}", fn) for i, item in enumerate(node))
    if isinstance(node, State):
        prefix = f"{name}." if name else ""
        fields = dataclasses.fields(node)  # type: ignore[arg-type]
        values = {f.name: getattr(node, f.name) for f in fields if "static" not in f.metadata}
        return dataclasses.replace(  # type: ignore[type-var]
            node, **{key: _map(value, prefix + key, fn) for key, value in values.items()}
        )
    assert node is None, f"a state may not hold {type(node).__name__} ({name})"
    return None


def save_state(state: State, path: Path) -> None:
    """Writes all tensors of a state to one safetensors file."""
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in state.tensors().items()}, str(path))


def load_state(template: S, path: Path) -> S:
    """Reads a state written by `save_state`; `template` (from `init_state`) gives structure, device and dtype.

    The capacity may differ from the template's: the file's is kept. Raises ValueError when a tensor is
    missing, unexpected, or of another dtype or rank than the template's.
    """
    from safetensors.torch import load_file

    loaded = load_file(str(path))
    expected = template.tensors()
    if loaded.keys() != expected.keys():
        odd = sorted(loaded.keys() ^ expected.keys())
        raise ValueError(f"{path}: not a state of this model; tensors that only one side has: {odd}")

    def pick(name: str, like: Tensor) -> Tensor:
        tensor = loaded[name]
        if tensor.dtype != like.dtype or tensor.dim() != like.dim():
            raise ValueError(
                f"{path}: {name} is {tensor.dtype} of rank {tensor.dim()}, "
                f"the model needs {like.dtype} of rank {like.dim()}"
            )
        return tensor.to(like.device)

    return template.map(pick)


def new_zeros(*shape: int, device: torch.device | str | None, dtype: torch.dtype) -> Tensor:
    """An empty state's tensor. Zeros, not uninitialised memory: 0 * NaN would leak through a masked softmax."""
    return torch.zeros(*shape, device=device, dtype=dtype)
