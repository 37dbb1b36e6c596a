"""`cost` against independent counts: FLOPs of the products that run, and the allocator's records of memory."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from attnzoo.attention import Attention, Cost, build_attention
from attnzoo.attention.composed import ComposedAttention
from attnzoo.attention.mha import MHAConfig
from attnzoo.attention.parts import DistanceBias, Heads, Projection, SoftmaxMixing
from attnzoo.models import DecoderConfig, DecoderLM
from attnzoo.ops.common import row_blocks
from attnzoo.ops.linear_attention.weights import CHUNK
from attnzoo.profiling.memory import kept_bytes, peak_bytes

DIM = 128
VARIANTS: list[tuple[str, dict]] = [
    ("mha", {}),
    ("mha", {"num_kv_heads": 1}),
    ("mha", {"window": 100, "sinks": 4}),
    ("mha", {"qk_norm": True, "qkv_bias": True, "num_kv_heads": 2}),
    ("rmha", {}),
    ("rmha", {"position": "sinusoid"}),
    ("mdha", {}),
    ("rcmha", {}),
    ("rcmha", {"window": 100}),
    ("linear", {}),
    ("linear", {"normalise": False, "decay": False, "num_kv_heads": 2}),
]
CLOSE = 0.01
"""The largest relative error of derived memory. Half of it is for torch's fused attention, whose scratch is modelled;
the rest is exact but for the 5 KB of random state that a checkpoint keeps."""


def name(value: object) -> str:
    return str(value).replace(" ", "")


class Products(TorchDispatchMode):
    """Counts two FLOPs for every product of matrix products and fused attention, masked pairs included."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        operation, kwargs = func.overloadpacket.__name__, kwargs or {}
        if operation == "row_blocks":
            with self:  # an operator of its own, made of products
                return row_blocks._row_blocks._init_fn(*args, **kwargs)
        if operation == "matmul":
            with self:
                return func.decompose(*args, **kwargs)
        matrices = [a for a in args if isinstance(a, Tensor)]
        if operation in ("mm", "bmm", "addmm", "addmm_", "baddbmm", "baddbmm_"):
            left, right = matrices[-2:]
            self.flops += 2 * left.numel() * right.shape[-1]
        elif operation.startswith("_scaled_dot_product_flash"):
            q, k = matrices[:2]
            self.flops += 4 * q.numel() * k.shape[2]
        return func(*args, **kwargs)


def counted(call) -> int:
    with Products() as products, torch.no_grad():
        call()
    return products.flops


def hidden_flops(attention: Attention, batch: int, tokens: int) -> int:
    """FLOPs that the parallel form spends on pairs that the mask hides, from the mask itself."""
    mixing = attention.mixing
    heads, head_dim = mixing.heads.num_heads, mixing.heads.head_dim
    if not isinstance(mixing, SoftmaxMixing):
        # Chunks instead of the recurrence: scores and sums of all pairs of a chunk, padding included.
        padded = -(-tokens // CHUNK) * CHUNK
        width = head_dim + int(mixing.normalise)
        carried = 2 * (heads + mixing.heads.num_kv_heads) * head_dim * width * (padded - tokens)
        return batch * (2 * heads * padded * CHUNK * (head_dim + width) + carried)
    visible = int(mixing.mask.visible(tokens, tokens, torch.device("cpu")).sum())
    tables = mixing.position.kind in ("table", "sinusoid")
    if mixing.mask.plain and not tables:
        return 4 * batch * heads * head_dim * (tokens**2 - visible)
    pairs = shifted = 0
    for rows in row_blocks._blocks(tokens, tokens, mixing.mask, slice(0, 1)):
        for span in rows.spans:
            pairs += (rows.end - rows.first) * (span[1] - span[0])
            shifted += (rows.end - rows.first) * row_blocks._product_width(rows, span)
    per_pair = 4 * (pairs - visible) + (2 * (shifted - visible) if tables else 0)
    return batch * heads * head_dim * per_pair


@pytest.mark.parametrize("tokens", [1, 130, 300])
@pytest.mark.parametrize(("kind", "options"), VARIANTS, ids=name)
def test_flops_of_the_parallel_form(kind, options, tokens):
    """What runs is what `cost` says and the work on hidden pairs, to the last FLOP (a convolution is no product)."""
    attention, batch = build_attention(kind, {"model_dim": DIM, **options}), 2
    x = torch.randn(batch, tokens, DIM)
    convolution = 0 if attention.conv is None else attention.conv.flops(batch, tokens)
    ran = counted(lambda: attention(x)) + convolution
    if kind == "linear" and tokens == 1:
        heads = attention.mixing.heads
        width = heads.head_dim + int(attention.mixing.normalise)
        assert ran + 2 * batch * heads.num_kv_heads * heads.head_dim * width == attention.cost(batch, 1, 1).flops
        return
    assert ran == attention.cost(batch, tokens, tokens).flops + hidden_flops(attention, batch, tokens)


@pytest.mark.parametrize(("kind", "options"), VARIANTS, ids=name)
def test_flops_of_a_decode_step(kind, options):
    """One token behind 40, 100 and 500 others: nothing is hidden, and nothing is computed in vain."""
    attention, batch = build_attention(kind, {"model_dim": DIM, "num_heads": 4, **options}), 2
    heads = attention.mixing.heads
    for context in (41, 101, 501):
        state = attention.init_state(batch, context)
        with torch.no_grad():
            _, state = attention.extend(torch.randn(batch, context - 1, DIM), state)
        ran = counted(lambda state=state: attention.extend(torch.randn(batch, 1, DIM), state))
        ran += 0 if attention.conv is None else attention.conv.flops(batch, 1)
        if kind == "linear":  # the update is an outer product
            ran += 2 * batch * heads.num_kv_heads * heads.head_dim * (heads.head_dim + int(attention.mixing.normalise))
        assert ran == attention.cost(batch, 1, context).flops


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((-1, 1, 5), "batch=-1 must be a whole number of at least 1"),
        ((1, 1.5, 5), "tokens=1.5 must be a whole number of at least 1"),
        ((1, True, 5), "tokens=True must be a whole number"),
        ((1, 1, 0), "context=0 must be a whole number of at least 1"),
        ((1, 10, 5), "tokens=10 is more than context=5, which includes them"),
    ],
)
def test_sizes_that_are_none(sizes, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        build_attention("rmha", {"model_dim": DIM, "num_heads": 4}).cost(*sizes)


def test_bytes_moved_by_hand():
    """A decode step reads the weights, the state and one vector, and writes one; rows of the table beyond the context
    stay where they are."""
    attention = build_attention("rmha", {"model_dim": DIM, "num_heads": 4, "max_distance": 256})
    cost = attention.cost(3, 1, 10)
    weights = 4 * DIM * DIM + DIM + 4 * 32 + 4 * 10 * 33
    assert cost.bytes_moved == 4 * (weights + 2 * 3 * DIM) + cost.state_bytes
    assert cost.state_bytes == 3 * (8 + 2 * 10 * DIM * 4)


def test_flops_of_layers_that_read_a_whole_context():
    """Products that run are what `cost` says: every token asks, all but the last `num_queries` are read."""
    for kind in ("in_context_linear", "softmax_regression"):
        attention = build_attention(kind, {"model_dim": 48, "num_heads": 2, "head_dim": 24, "num_queries": 3})
        x = torch.randn(2, 40, 48)
        assert counted(lambda attention=attention, x=x: attention(x)) == attention.cost(2, 40, 40).flops
    for flavor in ("paper", "official"):
        attention = build_attention("tscan", {"model_dim": 48, "num_heads": 2, "flavor": flavor})
        x, context = torch.randn(2, 13, 48), torch.randn(2, 40, 48)
        ran = counted(lambda attention=attention, x=x, context=context: attention(x, context_BSD=context))
        assert ran == attention.cost(2, 13, 40).flops


def test_flops_of_a_mesa_layer_by_hand():
    """Projections; a kv head: two outer products and a Cholesky factorisation; a query head: two solves and a read."""
    cost = build_attention("mesa", {"model_dim": 32, "num_heads": 4, "num_kv_heads": 2}).cost(3, 1, 10)
    projections = 2 * (2 * 32 * 32 + 2 * 32 * 16)
    assert cost.flops == 3 * (projections + 2 * (2 * 2 * 64 + 512 // 3) + 4 * (2 * 64 + 2 * 64))
    assert cost.state_bytes == 3 * (8 + 2 * 2 * 64 * 4)


def test_costs_add_up():
    assert Cost(1, 2, 3, 4) + Cost(10, 20, 30, 40) == Cost(11, 22, 33, 44)


@pytest.mark.parametrize(("batch", "tokens"), [(5, 131), (1, 1030)])
@pytest.mark.parametrize(("kind", "options"), [*VARIANTS, ("mesa", {}), ("mesa", {"num_kv_heads": 1})], ids=name)
def test_memory_of_training_a_layer(kind, options, batch, tokens):
    """Counted: all that forward and backward allocate, the output and the input's gradient included; not the input,
    the output's gradient, the parameters and their gradients, which exist before."""
    attention = build_attention(kind, {"model_dim": DIM, **options})
    x = torch.randn(batch, tokens, DIM, requires_grad=True)
    dy = torch.randn(batch, tokens, DIM)
    for parameter in attention.parameters():
        parameter.grad = torch.zeros_like(parameter)
    attention(x).backward(dy)  # constants that all calls share are made in the first one
    x.grad = None
    memory = attention.training_memory(batch, tokens)
    assert kept_bytes(lambda: attention(x)) == pytest.approx(memory.kept, rel=0.001)
    assert peak_bytes(lambda: attention(x).backward(dy)) == pytest.approx(memory.peak, rel=CLOSE)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"attention": "mha", "mlp": "gelu", "norm": "layernorm", "tie_embeddings": False},
        {"attention": ["rcmha", "linear"]},
        {"attention": {"kind": "rmha", "position": "sinusoid"}, "mlp": "relu"},
    ],
    ids=name,
)
def test_memory_of_training_a_model(options, checkpointing):
    """Loss and backward: logits, their gradient and the softmax of long vocabularies; blocks of deep models."""
    for vocabulary, dim, layers, batch, tokens in ((2048, 64, 2, 2, 256), (61, 96, 4, 3, 128)):
        config = DecoderConfig(vocab_size=vocabulary, model_dim=dim, num_layers=layers, max_positions=tokens, **options)
        model = DecoderLM(config)
        model.activation_checkpointing = checkpointing
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        block = torch.randint(0, vocabulary, (batch, tokens + 1))

        def step(model=model, block=block) -> None:
            model.loss(block[:, :-1], block[:, 1:]).backward()

        step()
        assert peak_bytes(step) == pytest.approx(model.training_memory(batch, tokens).peak, rel=CLOSE)


def test_memory_of_training_in_bfloat16():
    config = DecoderConfig(vocab_size=1024, model_dim=64, num_layers=4, max_positions=256, attention="rcmha")
    model = DecoderLM(config).bfloat16()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    block = torch.randint(0, 1024, (2, 257))

    def step() -> None:
        model.loss(block[:, :-1], block[:, 1:]).backward()

    step()
    assert peak_bytes(step) == pytest.approx(model.training_memory(2, 256).peak, rel=CLOSE)


class Alibi(DistanceBias):
    """Fixed slopes."""

    def bias(self, distance_P: Tensor) -> Tensor:
        return -(2.0 ** -torch.arange(1.0, self.heads.num_heads + 1))[:, None] * distance_P


@pytest.mark.parametrize(("batch", "tokens"), [(2, 512)])
@pytest.mark.parametrize("window", [None, 100])
def test_memory_of_training_with_a_bias_by_distance(window, batch, tokens):
    """No table of zeros: the bias is a number a head and distance."""
    heads = Heads.of(DIM, 4, None, None)
    mixing = SoftmaxMixing(heads, Alibi(heads), window=window)
    attention = ComposedAttention(MHAConfig(model_dim=DIM), projection=Projection(heads), mixing=mixing)
    x, dy = torch.randn(batch, tokens, DIM, requires_grad=True), torch.randn(batch, tokens, DIM)
    for parameter in attention.parameters():
        parameter.grad = torch.zeros_like(parameter)
    attention(x).backward(dy)
    x.grad = None
    memory = attention.training_memory(batch, tokens)
    assert kept_bytes(lambda: attention(x)) == pytest.approx(memory.kept, rel=0.001)
    assert peak_bytes(lambda: attention(x).backward(dy)) == pytest.approx(memory.peak, rel=CLOSE)


def test_peak_is_seen_inside_operators_and_after_release():
    def call() -> Tensor:
        x = torch.empty(1 << 20)
        del x
        return torch.ones(1 << 10).softmax(0)

    assert peak_bytes(call) == 4 << 20
    assert kept_bytes(call) == 4 << 10
    assert peak_bytes(lambda: None) == 0
