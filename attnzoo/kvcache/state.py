"""What a sequence needs for its next token: trees of tensors with the batch axis first.

A `State` is a dataclass whose fields are tensors, other states, tuples of states, or None. Anything else, such as its
policy, is a field with the metadata `STATIC`, which is passed on unchanged and not saved. Because every tensor has the
batch as its first axis, a server can hold one batched state and let sequences join and leave by rows, without knowing
what an attention variant keeps (keys and values, convolution tails, a matrix, ...).

States are consumed: `extend` may write into the buffers of the state it is given when autograd is off.
`clone()` first to continue one state in two ways; `extend` refuses a state that has lost its memory to another
(`attnzoo.kvcache.succession`).
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from attnzoo.kvcache.succession import NO_CLAIM, MemoryClaim, check_current

S = TypeVar("S", bound="State")


STATIC = {"static": True}
"""Metadata of a dataclass field that is not part of the tree: states made from this one share its value. A file holds
the text of its method `describe` instead."""


class State:
    """Base of all states. Subclasses are dataclasses of Tensor | State | tuple[State, ...] | None."""

    # No fields: this class is no dataclass.
    _claim: MemoryClaim | None = None
    _made_by: int = 0
    """The id of the layer whose `extend` has made it, which need not look at its sizes again."""

    @property
    def rewinds(self) -> bool:
        """Whether a state can be continued again although `extend` has written later tokens into its memory."""
        return True

    def shares(self, after: Any) -> bool:
        """Whether `extend`, which made `after` of this state, has written into this state's memory."""
        return False

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

    def columns(self) -> dict[str, Tensor]:
        """This node's own tensors by what they hold: "keys" for keys_BKPC."""
        own = [(name, getattr(self, name)) for name, _ in fields_of(type(self))]
        return {name.rpartition("_")[0]: x for name, x in own if isinstance(x, Tensor)}

    def nbytes(self) -> int:
        """Bytes of all tensors as allocated (whole capacity, masks, indices and tails included)."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def rows(self: S, index: slice) -> S:
        """Views of the sequences in `index`, not copies: in-place writes of `extend` reach this state."""
        return _view(self.map(lambda _, tensor: tensor[index]))

    def cut(self: S, tokens: int) -> S:
        """Views of the slots that sequences of at most `tokens` tokens fill: in-place writes reach this state.

        By default everything, for states of constant size; states that grow override it.
        """
        return _view(_cut(self, tokens))

    def clone(self: S) -> S:
        """An independent copy: the way to continue one state in two ways. Raises ValueError for a state that another
        continuation has written over."""
        _check(self)
        return self.map(lambda _, tensor: tensor.clone())

    def __deepcopy__(self: S, memo: dict[int, Any]) -> S:
        return self.clone()  # torch deep-copies no tensor that has a gradient to come

    def store(self: S, index: slice, other: S) -> None:
        """Writes `other` (a state of those rows) into the rows `index` of this one, in place.

        Tensors of `other` that are views of these rows (because `extend` wrote in place) are not copied. Raises
        ValueError when shapes differ, for example when `other` has grown past this capacity.
        """
        self.rows(index).fill(other)

    def fill(self, other: "State") -> None:
        """Writes `other` into this state, in place, without copying tensors that both share.

        Raises ValueError as `store`.
        """
        _fill(self, other, "")

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return len(next(iter(self.tensors().values())))

    def joined(self: S, other: S) -> S:
        """The sequences of both, this state's first. Both are consumed tensor by tensor, so that one tensor at most
        exists twice.

        The state with fewer slots gets empty ones, which are zeros in every variant's state. Raises ValueError if the
        two differ in the names or dtypes of their tensors, or one has been written over.
        """
        self.check_joins(other)
        theirs = other.tensors()

        def join(name: str, mine: Tensor) -> Tensor:
            added = theirs.pop(name)
            sizes = [max(pair) for pair in zip(mine.shape[1:], added.shape[1:], strict=True)]
            out = mine.new_zeros(len(mine) + len(added), *sizes)
            for rows, x in ((slice(0, len(mine)), mine), (slice(len(mine), None), added)):
                out[(rows, *(slice(0, size) for size in x.shape[1:]))] = x
            return out

        return _consume(self, "", join)

    def check_joins(self, other: "State") -> None:
        """Raises ValueError if `joined` would; nothing is consumed."""
        _check(self)
        _check(other)
        mine, theirs = self.tensors(), other.tensors()
        if theirs.keys() != mine.keys():
            odd = sorted(theirs.keys() ^ mine.keys())
            raise ValueError(f"states of different kinds cannot be joined; tensors that only one has: {odd}")
        for name, x in mine.items():
            if x.dtype != theirs[name].dtype or x.dim() != theirs[name].dim():
                raise ValueError(f"state {name!r}: {x.dtype} of rank {x.dim()} cannot take {theirs[name].dtype}")
            for axis, letter in enumerate(axes(name)):
                sizes = (x.shape[axis], theirs[name].shape[axis])
                if letter in FIXED_AXES and sizes[0] != sizes[1] and 0 not in sizes:
                    raise ValueError(
                        f"state {name!r}: axis {letter} is {sizes[0]} in one and {sizes[1]} in the other; states of "
                        "one model alone can be joined"
                    )

    def keep_rows(self: S, order: Sequence[int]) -> S:
        """The sequences at these indices, in this order, in new memory. This state is consumed, tensor by tensor.

        Raises ValueError for a state that another continuation has written over.
        """
        _check(self)
        return _consume(self, "", lambda _, x: x[torch.as_tensor(order, device=x.device, dtype=torch.long)])

    def reset(self, index: slice) -> None:
        """Empties the sequences in `index`, in place: every variant's empty state is all zeros."""
        for tensor in self.tensors().values():
            tensor[index].zero_()


def _parts(node: Any) -> Iterator["State"]:
    """All states of a tree."""
    if isinstance(node, tuple):
        for item in node:
            yield from _parts(item)
    elif isinstance(node, State):
        yield node
        for key, static in fields_of(type(node)):
            if not static:
                yield from _parts(getattr(node, key))


def _check(state: State) -> None:
    for part in _parts(state):
        check_current(part)


def _view(state: S) -> S:
    if not torch.compiler.is_compiling():
        for part in _parts(state):
            part._claim = NO_CLAIM
    return state


def writable(state: S, like: Tensor) -> S:
    """The state; a copy where `like`, a tensor of it, was made in inference mode and torch refuses to write to it."""
    if torch.compiler.is_compiling() or not like.is_inference() or torch.is_inference_mode_enabled():
        return state
    return state.clone()


def _cut(node: Any, tokens: int) -> Any:
    if isinstance(node, tuple):
        return tuple(item.cut(tokens) for item in node)
    if not isinstance(node, State):
        return node
    return rebuilt(node, lambda _, value: value.cut(tokens) if isinstance(value, State) else _cut(value, tokens))


def rebuilt(node: S, fn: Callable[[str, Any], Any]) -> S:
    """The state with `fn(name, value)` for its fields; static ones stay."""
    fields = fields_of(type(node))
    return type(node)(**{key: getattr(node, key) if static else fn(key, getattr(node, key)) for key, static in fields})


def _fill(mine: Any, theirs: Any, name: str) -> None:
    if mine is theirs:
        return
    if isinstance(mine, Tensor):
        if mine.shape != theirs.shape:
            raise ValueError(
                f"state {name!r}: rows of shape {tuple(mine.shape)} cannot hold {tuple(theirs.shape)}; "
                "allocate the state with a larger capacity"
            )
        if torch.compiler.is_compiling() or mine.data_ptr() != theirs.data_ptr():
            mine.copy_(theirs)
    elif isinstance(mine, tuple):
        for i, (target, source) in enumerate(zip(mine, theirs, strict=True)):
            _fill(target, source, f"{name}.{i}")
    else:
        prefix = f"{name}." if name else ""
        if not torch.compiler.is_compiling() and mine._claim is not NO_CLAIM:
            mine._claim = None  # it holds what the other holds
        for key, static in fields_of(type(mine)):
            if not static:
                _fill(getattr(mine, key), getattr(theirs, key), prefix + key)


def fields_of(kind: type[Any]) -> list[tuple[str, bool]]:
    """(name, whether it is static) of each."""
    # dataclasses.fields would say the same, but neither quickly nor to torch's compiler.
    return [(name, "static" in field.metadata) for name, field in kind.__dataclass_fields__.items()]


def _map(node: Any, name: str, fn: Callable[[str, Tensor], Tensor]) -> Any:
    if isinstance(node, Tensor):
        return fn(name, node)
    if isinstance(node, tuple):
        return tuple(_map(item, f"{name}.{i}", fn) for i, item in enumerate(node))
    if isinstance(node, State):
        prefix = f"{name}." if name else ""
        return rebuilt(node, lambda key, value: _map(value, prefix + key, fn))
    assert node is None, f"a state may not hold {type(node).__name__} ({name})"
    return None


def _consume(node: Any, name: str, fn: Callable[[str, Tensor], Tensor]) -> Any:
    """`_map` in place: each old tensor is freed before the next new one is made."""
    if isinstance(node, Tensor):
        return fn(name, node)
    if isinstance(node, tuple):
        return tuple(_consume(item, f"{name}.{i}", fn) for i, item in enumerate(node))
    if isinstance(node, State):
        for key, static in fields_of(type(node)):
            if not static:
                setattr(node, key, _consume(getattr(node, key), f"{name}.{key}" if name else key, fn))
        node._claim = None  # the memory is new
        return node
    assert node is None, f"a state may not hold {type(node).__name__} ({name})"
    return None


def _origins(node: Any) -> dict[str, str]:
    """`describe()` of a tree's static fields, by field name. All layers have the same, which is stored once."""
    found: dict[str, str] = {}
    if isinstance(node, tuple):
        for item in node:
            found |= _origins(item)
    elif isinstance(node, State):
        for key, static in fields_of(type(node)):
            value = getattr(node, key)
            if not static:
                found |= _origins(value)
            elif value is not None:
                found[key] = value.describe()
    return found


ORIGIN = "attnzoo.state"
"""Key of a file's metadata: JSON of `_origins`."""


def save_state(state: State, path: Path) -> None:
    """Writes a state to one safetensors file: its tensors, and descriptions of its model and cache policy. Raises
    ValueError for a state that another continuation has written over."""
    from safetensors.torch import save_file

    if not isinstance(state, State):
        raise ValueError(f"save_state takes a state and then a path, and got a {type(state).__name__}")
    _check(state)
    tensors = {name: tensor.contiguous() for name, tensor in state.tensors().items()}
    save_file(tensors, str(path), metadata={ORIGIN: json.dumps(_origins(state))})


def load_state(template: S, path: Path) -> S:
    """Reads a state written by `save_state`; `template` (from `init_state`) gives structure, device and dtype.

    The capacity and the number of sequences may differ from the template's: the file's are kept. Raises ValueError for
    a file that is not a state, for a state of another model or cache policy, and when a tensor is missing, unexpected,
    or of another dtype, rank or size than the template's.
    """
    if not isinstance(template, State):
        raise ValueError(f"load_state takes a state of init_state and then a path, and got a {type(template).__name__}")
    loaded, origins = _read(path)
    for name, mine in _origins(template).items():
        if origins.get(name) != mine:
            raise ValueError(f"{path}: a state of another {name}: {_difference(origins.get(name), mine)}")
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
        for axis, letter in enumerate(axes(name)):
            if letter in FIXED_AXES and like.shape[axis] and tensor.shape[axis] != like.shape[axis]:
                raise ValueError(
                    f"{path}: {name} has shape {tuple(tensor.shape)}, and axis {letter} is {like.shape[axis]} in this "
                    "model; load it into the model that it was saved from"
                )
        return tensor.to(like.device)

    return template.map(pick)


FIXED_AXES = "KHD"
"""Letters of the axes whose sizes the model fixes; a tensor's name ends with the letters of its axes."""


def axes(name: str) -> str:
    """The letters of a tensor's axes, in order; empty where its name has no such ending."""
    letters = re.search(r"_(B[A-Z0-9]*)$", name)
    return letters[1] if letters else ""


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, origins) of a file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            origins = json.loads((file.metadata() or {}).get(ORIGIN, "{}"))
            return {name: file.get_tensor(name) for name in file.keys()}, origins  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(f"{path}: not a state written by save_state ({error})") from None


def _difference(theirs: str | None, mine: str) -> str:
    """Where two descriptions differ, in a few words."""
    if theirs is None:
        return f"the file does not say which, and this one is {mine}"
    start = next((i for i, (a, b) in enumerate(zip(theirs, mine, strict=False)) if a != b), min(len(theirs), len(mine)))
    start = max(0, start - 40)
    return f"the file's is {theirs[start : start + 80]!r} where this one is {mine[start : start + 80]!r}"


def new_zeros(*shape: int, device: torch.device | str | None, dtype: torch.dtype) -> Tensor:
    """An empty state's tensor. Zeros, not uninitialised memory: 0 * NaN would leak through a masked softmax. Raises
    ValueError where the memory of a CPU does not hold it."""
    try:
        return torch.zeros(*shape, device=device, dtype=dtype)
    except RuntimeError as error:
        # torch has no kind of error for "can't allocate memory" on a CPU, nor for a product of sizes that overflows.
        if re.search("DefaultCPUAllocator|storage size|overflow", str(error), re.IGNORECASE):
            raise ValueError(
                f"a state with a tensor of {list(shape)} numbers in {dtype} does not fit into memory; give "
                "init_state a smaller batch or capacity"
            ) from None
        raise
