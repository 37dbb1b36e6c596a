"""GGUF files against what transformers makes of the same file, and against the tensors that were put in."""

import struct

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import AutoModelForCausalLM

from attnzoo.checkpoint import load_model, open_checkpoint
from attnzoo.checkpoint.names import GGUF, rename
from attnzoo.gguf_file import read_gguf
from attnzoo.models import generate
from attnzoo.ops.rope.scaling import RopeScaling, frequencies
from attnzoo.tokenizer import load_tokenizer
from tests.helpers.gguf_files import HEADS, KV_HEADS, neighbours, random_model, smollm2, write_model


@pytest.mark.parametrize("tied", [False, True])
def test_tensors_come_back(tied, tmp_path):
    model = random_model(tied)
    loaded = load_model(write_model(tmp_path / "m.gguf", model))
    assert loaded.config == model.config or loaded.config.norm_eps == pytest.approx(1e-5)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name


@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1], ids=str)
def test_quantised_rows_are_the_package_s(kind, tmp_path, monkeypatch):
    """Every type, read in pieces of few rows, is what the package dequantises whole; q and k are put back in order."""
    monkeypatch.setattr("attnzoo.checkpoint.gguf.PIECE", 300)
    model = random_model()
    path = write_model(tmp_path / "m.gguf", model, kind)
    loaded = load_model(path).state_dict()
    reader = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for own in loaded:
        tensor = reader[rename(own, GGUF)]
        expected = torch.from_numpy(np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
        actual = loaded[own]
        for part, heads in (("query", HEADS), ("key", KV_HEADS)):
            if own.endswith(f"projection.{part}.weight"):
                actual = neighbours(actual, heads)
        assert torch.equal(actual, expected), own
        assert (actual - expected).abs().max() == 0


def test_head_of_the_file_is_what_the_package_reads(tmp_path):
    path = write_model(tmp_path / "m.gguf", random_model(), Kind.Q8_0)
    reader = gguf.GGUFReader(path)
    file = read_gguf(path)
    assert {t.name: (tuple(reversed(t.shape.tolist())), int(t.tensor_type), t.data_offset) for t in reader.tensors} == {
        name: (tensor.shape, tensor.kind, tensor.offset) for name, tensor in file.tensors.items()
    }


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_divisors_of_llama_3(factor, tmp_path):
    scaling = {"kind": "llama3", "factor": factor, "original_max_positions": 8192}
    plain = frequencies(8, 500000.0, None, like=torch.zeros((), dtype=torch.float64))
    divisors = plain / frequencies(8, 500000.0, RopeScaling.of(scaling), like=plain)
    model = random_model(rope_theta=500000.0)
    path = write_model(tmp_path / "m.gguf", model, extra={"rope_freqs.weight": divisors.float().numpy()})
    assert load_model(path).config.layer_attention(0)[1]["rope_scaling"] == scaling
    none = write_model(tmp_path / "n.gguf", model, extra={"rope_freqs.weight": np.ones(8, np.float32)})
    assert load_model(none).config.layer_attention(0)[1]["rope_scaling"] is None
    odd = write_model(tmp_path / "o.gguf", model, extra={"rope_freqs.weight": (divisors * 1.01).float().numpy()})
    with pytest.raises(ValueError, match=r"rope_freqs.weight follows no rule known here"):
        load_model(odd)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"rope.scaling.factor": 4.0}, 4.0),  # without a type
        ({"rope.scaling.factor": 4.0, "rope.scaling.type": "linear"}, 4.0),
        ({"rope.scaling.factor": 4.0, "rope.scaling.type": "none"}, None),
        ({"rope.scaling.factor": 1.0}, None),
        ({"rope.scaling.type": "linear"}, None),
        ({"rope.scale_linear": 2.0}, 2.0),  # the older name
        ({"rope.scale_linear": 2.0, "rope.scaling.factor": 3.0}, 3.0),
        ({"rope.scale_linear": 0.0}, None),
        ({}, None),
    ],
)
def test_linear_scaling_by_llama_cpp_s_rules(changes, expected, tmp_path):
    config = open_checkpoint(write_model(tmp_path / "m.gguf", random_model(), **changes)).config
    scaling = None if expected is None else {"kind": "linear", "factor": expected}
    assert config.layer_attention(0)[1]["rope_scaling"] == scaling


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rope.scaling.factor": 4.0, "rope.scaling.type": "longrope"},
            r"rope.scaling.type='longrope' is not supported",
        ),
        ({"rope.scaling.factor": 0.5}, r"rope_scaling.factor=0.5 must be at least 1"),
        ({"rope.scaling.factor": float("nan")}, r"llama.rope.scaling.factor=nan is not finite"),
        (
            {"rope.scaling.factor": 4.0, "extra": {"rope_freqs.weight": np.full(8, 2, np.float32)}},
            r"rope_freqs.weight follows no rule known",
        ),
        ({"attention.head_count": 0}, r"llama.attention.head_count=0 must be at least 1"),
        ({"attention.head_count_kv": 0}, r"llama.attention.head_count_kv=0 must be at least 1"),
        ({"embedding_length": 0}, r"llama.embedding_length=0 must be at least 1"),
        ({"block_count": 0}, r"^[^:]*m.gguf: num_layers=0 must be at least 1"),
        ({"feed_forward_length": "x"}, r"^[^:]*m.gguf: llama.feed_forward_length='x' is not supported"),
        ({"block_count": 2**31}, r"num_layers=2147483648 must be at most"),
        ({"attention.sliding_window": 0}, r"llama.attention.sliding_window=0 must be at least 1"),
        ({"logit_scale": 2.0}, r"llama.logit_scale=2.0 is not supported"),
        ({"attention.clamp_kqv": 8.0}, r"llama.attention.clamp_kqv=8.0 is not supported"),
        ({"rope.scaling.attn_factor": 0.5}, r"llama.rope.scaling.attn_factor=0.5 is not supported"),
        ({"arch": "gemma"}, r"general.architecture='gemma' is not supported; known: llama"),
        ({"expert_count": 8}, r"llama.expert_count=8 is not supported"),
        ({"rope.dimension_count": 8}, r"llama.rope.dimension_count=8 differs from the head's 16"),
        ({"rope.scaling.type": "yarn"}, r"llama.rope.scaling.type='yarn' is not supported"),
        ({"attention.head_count": 2.0}, r"llama.attention.head_count=2.0 is not supported; it must be int"),
        ({"block_count": 3}, r"missing: blk.2.attn_k.weight \[32, 64\]"),
        ({"drop": "norm.weight"}, r"missing: output_norm.weight \[64\]"),
        ({"feed_forward_length": 97}, r"blk.0.ffn_down.weight is \[64, 96\], not \[64, 97\]"),
        ({"extra": {"blk.0.attn_q.bias": np.zeros(64, np.float32)}}, r"unexpected: blk.0.attn_q.bias \[64\]"),
    ],
)
def test_errors_name_field_or_tensor(changes, message, tmp_path):
    path = write_model(tmp_path / "m.gguf", random_model(), **changes)
    with pytest.raises(ValueError, match=message):
        load_model(path)


def test_cut_files_are_refused_before_anything_is_read(tmp_path):
    whole = write_model(tmp_path / "m.gguf", random_model(), Kind.Q8_0).read_bytes()
    path = tmp_path / "cut.gguf"
    path.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"tensor \S+ reaches past the end of the file"):
        open_checkpoint(path)
    for size in range(0, 1500, 37):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"cut.gguf"):
            open_checkpoint(path)


@pytest.mark.parametrize("harm", ["earlier", "later", "uneven", "shared", "smaller type", "fewer elements"])
def test_data_lie_one_after_the_other(harm, tmp_path):
    """A type, a shape or a place that lies is seen by its neighbours: what is read would be other tensors' bytes."""
    path = write_model(tmp_path / "m.gguf", random_model(tied=True), Kind.F32)
    content, name = bytearray(path.read_bytes()), b"blk.0.ffn_norm.weight"
    axes = content.index(name) + len(name) + 4  # after the rank: one size, the type, the offset
    if harm == "smaller type":
        struct.pack_into("<I", content, axes + 8, int(Kind.F16))
    elif harm == "fewer elements":
        struct.pack_into("<Q", content, axes, 32)
    else:
        (offset,) = struct.unpack_from("<Q", content, axes + 12)
        moved = {"earlier": offset - 32, "later": offset + 32, "uneven": offset + 1, "shared": 0}[harm]
        struct.pack_into("<Q", content, axes + 12, moved)
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"m.gguf: tensor \S+ begins at byte \d+, and what stands before it ends at \d+"
    ):
        open_checkpoint(path)


PROMPTS = [
    "Are dogs real?",
    "Write a haiku about the sea.",
    "def fibonacci(n):",
    "The capital of France is",
    "List three prime numbers larger than 100.",
    "Translate to German: good morning, my friend.",
    "Explain attention in a neural network to a child.",
    "Q: What is 12 * 7?\nA:",
    "Once upon a time, in a village by the river,",
    "数学は",
]


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.Q8_0, Kind.Q4_0], ids=str)
@pytest.mark.parametrize("tied", [False, True])
def test_a_small_model_computes_what_transformers_does(tied, kind, tmp_path):
    """On the same dequantised weights, after the order of rows that GGUF has for rotated queries and keys."""
    path = write_model(tmp_path / "m.gguf", random_model(tied), kind, vocab_size=96)
    ours = load_model(path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32).eval()
    tokens_BT = torch.randint(96, (2, 23))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens_BT).float(), theirs(tokens_BT).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_smollm2_writes_the_same_text_as_transformers():
    """Greedy text on the same dequantised weights."""
    path = smollm2()
    tokenizer, ours = load_tokenizer(path), load_model(path)
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    texts = generate(ours, prompts, max_new_tokens=64)
    for prompt, text in zip(prompts, texts, strict=True):
        out = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=2
        )
        assert out[0, len(prompt) :].tolist() == text, tokenizer.decode(prompt)
