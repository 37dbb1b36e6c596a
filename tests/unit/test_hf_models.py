"""The model type "attnzoo" in transformers: forward, generate, save and load, and adapters of peft."""

import peft
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

import attnzoo.hf
from attnzoo.checkpoint import load_model, load_tokenizer
from attnzoo.hf import AttnzooConfig, AttnzooForCausalLM, DecoderCache
from attnzoo.models import DecoderConfig, DecoderLM, buffer_dtype, generate
from tests.helpers.newcomers import newcomer
from tests.helpers.serving import KINDS, TOKENS, small_model, tokenizer

LENGTHS = (3, 11, 1, 7)
NEW = 14
PAD = 0


def wrapped(kind: str = "rcmha", **options) -> AttnzooForCausalLM:
    return AttnzooForCausalLM.of(small_model(kind, **options))


def prompts(seed: int = 4) -> list[list[int]]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(4, TOKENS, (length,), generator=draw).tolist() for length in LENGTHS]


def batch(rows: list[list[int]], side: str = "left") -> dict[str, torch.Tensor]:
    longest = max(map(len, rows))
    ids, mask = torch.full((len(rows), longest), PAD), torch.zeros(len(rows), longest, dtype=torch.long)
    for number, row in enumerate(rows):
        place = slice(longest - len(row), None) if side == "left" else slice(0, len(row))
        ids[number, place], mask[number, place] = torch.tensor(row), 1
    return {"input_ids": ids, "attention_mask": mask}


def greedy(model, rows, **options) -> list[list[int]]:
    inputs = batch(rows)
    out = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, pad_token_id=PAD, **options)
    return out[:, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_text(kind):
    """A left-padded batch, every row alone, and without a cache, all as our own loop has it."""
    model = wrapped(kind)
    expected = generate(model.model, prompts(), max_new_tokens=NEW)
    assert greedy(model, prompts()) == expected
    assert greedy(model, prompts(), use_cache=False) == expected
    for row, text in zip(prompts(), expected, strict=True):
        assert greedy(model, [row]) == [text]
    ids = torch.tensor([prompts()[1]])
    out = model.generate(ids, max_new_tokens=NEW, do_sample=False, pad_token_id=PAD)  # no mask at all
    assert out[0, ids.shape[1] :].tolist() == expected[1]


def test_a_finished_row_is_padded():
    model = wrapped("mixed")
    text = generate(model.model, prompts(), max_new_tokens=NEW)
    stop = text[0][3]
    stopped = generate(model.model, prompts(), max_new_tokens=NEW, stop_token=stop)
    for row, mine in zip(greedy(model, prompts(), eos_token_id=stop), stopped, strict=True):
        assert row[: len(mine)] == mine
        assert row[len(mine) : len(mine) + 1] in ([stop], [])
        assert set(row[len(mine) + 1 :]) <= {PAD}


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_padding_changes_nothing(kind):
    """Rows padded on either side, with holes, through both forms: the logits of every row alone."""
    model = wrapped(kind).double()
    alone = [model(torch.tensor([row])).logits[0] for row in prompts()]
    for side in ("left", "right"):
        inputs = batch(prompts(), side)
        for use_cache in (False, True):
            logits = model(**inputs, use_cache=use_cache).logits
            assert torch.isfinite(logits).all()
            for row, expected in enumerate(alone):
                real = inputs["attention_mask"][row].bool()
                torch.testing.assert_close(logits[row, real], expected, rtol=1e-10, atol=1e-9)
    row = prompts()[1]
    holes = torch.tensor([[1, 1, 0, 0, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1]])
    ids = torch.zeros_like(holes).masked_scatter(holes.bool(), torch.tensor(row))
    logits = model(ids, attention_mask=holes).logits[0, holes[0].bool()]
    torch.testing.assert_close(logits, alone[1], rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_chunks_with_padding_of_their_own(kind):
    """Rows of a cache grow by different numbers of tokens."""
    model, (one, other) = wrapped(kind).double(), (prompts()[1], prompts()[3])
    alone = [model(torch.tensor([row])).logits[0, -1] for row in (one, other)]
    first = batch([one[:5], other[:2]])
    cache = model(**first, use_cache=True).cache
    second = batch([one[5:], other[2:]])
    mask = torch.cat([first["attention_mask"], second["attention_mask"]], 1)
    for given in (mask, second["attention_mask"]):
        copy = DecoderCache()
        copy.append(cache.state.clone(), cache.real_BS)
        out = model(second["input_ids"], attention_mask=given, cache=copy)
        assert out.cache is copy
        assert copy.get_seq_length() == mask.shape[1]
        torch.testing.assert_close(out.logits[:, -1], torch.stack(alone), rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("kind", ["rcmha", "mixed", "window"])
def test_beams(kind):
    """The best of few beams over few tokens, found again by scoring every continuation of the beams' prefixes."""
    model = wrapped(kind)
    model.model.head.weight.div_(20)  # close races, so that beams change places
    options = {"max_new_tokens": 6, "num_beams": 4, "do_sample": False, "pad_token_id": PAD}
    inputs = batch(prompts())
    out = model.generate(**inputs, **options)
    assert torch.equal(out, model.generate(**inputs, **options, use_cache=False))
    assert not torch.equal(out, model.generate(**inputs, **options | {"num_beams": 1}))
    for row, prompt in enumerate(prompts()):
        alone = model.generate(torch.tensor([prompt]), **options)
        assert alone[0, len(prompt) :].tolist() == out[row, max(LENGTHS) :].tolist()


def test_sampling_follows_the_seed():
    model = wrapped("mixed")
    model.model.head.weight.div_(20)

    def text(seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        out = model.generate(**batch(prompts()), max_new_tokens=NEW, do_sample=True, top_k=20, num_return_sequences=2)
        return out.tolist()

    assert len(text(1)) == 2 * len(LENGTHS)
    assert text(1) == text(1)
    assert text(1) != text(2)


def test_a_conversation_goes_on_from_its_cache():
    """generate with the cache of the turn before: the whole text, and the new part alone."""
    model, (one, other) = wrapped("mixed"), (prompts()[1], prompts()[3])
    for whole in (True, False):
        cache = DecoderCache()
        options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": PAD, "cache": cache}
        said = model.generate(torch.tensor([one]), **options)[0].tolist()
        ids = said + other
        out = model.generate(
            torch.tensor([ids if whole else ids[cache.get_seq_length() :]]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            **options,
        )
        assert out[0, -5:].tolist() == generate(model.model, [ids], max_new_tokens=5)[0]


@pytest.mark.parametrize("kind", ["rcmha", "linear", "mha"])
def test_loss_and_gradients(kind):
    """Labels are shifted, -100 is left out, and padding neither predicts nor is predicted."""
    model = wrapped(kind).double().train().requires_grad_(True)
    ids = torch.tensor(prompts()[1])[None].repeat(2, 1)
    ids[1] = ids[1].flip(0)
    labels = ids.clone()
    labels[0, 4:6] = -100
    model(ids, labels=labels).loss.backward()
    mine = {name: parameter.grad.clone() for name, parameter in model.model.named_parameters()}
    model.zero_grad()
    expected = model.model.loss(ids[:, :-1], labels[:, 1:])
    expected.backward()
    torch.testing.assert_close(model(ids, labels=labels).loss, expected)
    for name, parameter in model.model.named_parameters():
        torch.testing.assert_close(mine[name], parameter.grad, rtol=1e-6, atol=1e-6, msg=name)

    for side in ("left", "right"):
        inputs = batch(prompts(), side)
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        losses = [
            F.cross_entropy(model(torch.tensor([row])).logits[0, :-1].float(), torch.tensor(row)[1:], reduction="sum")
            for row in prompts()
        ]
        count = sum(LENGTHS) - len(LENGTHS)
        loss = model(**inputs, labels=labels).loss
        torch.testing.assert_close(loss, sum(losses) / count)
        torch.testing.assert_close(model(**inputs, labels=labels, num_items_in_batch=10).loss, sum(losses) / 10)
        loss.backward()
        assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


def test_activation_checkpointing():
    model = wrapped("mixed").train().requires_grad_(True)
    ids = torch.tensor([prompts()[1]])
    model(ids, labels=ids).loss.backward()
    before = model.model.embedding.weight.grad.clone()
    model.zero_grad()
    model.activation_checkpointing_enable()
    assert model.model.activation_checkpointing
    model(ids, labels=ids).loss.backward()
    torch.testing.assert_close(model.model.embedding.weight.grad, before)
    model.activation_checkpointing_disable()
    assert not model.model.activation_checkpointing


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load(tied, dtype, tmp_path):
    torch.manual_seed(5)
    config = DecoderConfig(
        vocab_size=31, model_dim=16, num_layers=2, attention=["rcmha", "linear"], tie_embeddings=tied, init_std=0.3
    )
    decoder = DecoderLM(config).to(dtype)
    AttnzooForCausalLM.of(decoder).save_pretrained(tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert isinstance(loaded, AttnzooForCausalLM)
    assert loaded.model.config == config
    assert (loaded.model.head.weight is loaded.model.embedding.weight) == tied
    ours = load_model(tmp_path)
    assert ours.config == config
    for name, tensor in decoder.state_dict().items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, loaded.model.state_dict()[name]), name
        assert torch.equal(tensor, ours.state_dict()[name]), name
    assert AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).dtype == torch.float64


def test_export_with_a_tokenizer(tmp_path):
    """That every variant comes back is in the contract."""
    attnzoo.hf.export_model(tmp_path / "out", small_model("rcmha"), tokenizer=tokenizer())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.generation_config.eos_token_id == tokenizer().eos_id
    assert load_tokenizer(tmp_path / "out").encode("a b") == tokenizer().encode("a b")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_buffers_saved_and_not(dtype, tmp_path):
    """Of a variant outside the tree that keeps every kind; transformers leaves storage of any content where a buffer is
    not in the checkpoint. What `save_pretrained` writes is what `export_model` writes."""
    torch.manual_seed(6)
    ids = torch.tensor([prompts()[1]])
    with newcomer("buffered") as kind, torch.no_grad():
        decoder = DecoderLM(DecoderConfig(vocab_size=TOKENS, model_dim=32, num_layers=2, attention=kind)).eval()
        wrapped = AttnzooForCausalLM.of(decoder)
        assert torch.equal(wrapped(ids).logits, decoder(ids))
        wrapped.save_pretrained(tmp_path / "out")
        buffers = {name: buffer.clone() for name, buffer in decoder.named_buffers()}
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype)
        assert torch.equal(loaded(ids).logits, decoder.to(dtype)(ids))
        ours = load_model(tmp_path / "out", dtype=dtype)
        for name, buffer in buffers.items():
            theirs, wanted = loaded.model.get_buffer(name), buffer_dtype(buffer.dtype, dtype)
            assert theirs.dtype in (wanted, torch.float64), name  # transformers keeps that where it is saved
            assert torch.equal(theirs, buffer.to(theirs.dtype)), name
            assert torch.equal(ours.get_buffer(name), buffer.to(wanted)), name
            assert ours.get_buffer(name).dtype == wanted


def test_from_a_configuration():
    """A new model draws its weights as DecoderLM does."""
    config = small_model("mixed").config
    torch.manual_seed(9)
    expected = DecoderLM(config)
    torch.manual_seed(9)
    model = AutoModelForCausalLM.from_config(AttnzooConfig(decoder=config.to_dict()))
    assert all(torch.equal(a, b) for a, b in zip(expected.parameters(), model.model.parameters(), strict=True))
    assert AutoConfig.for_model("attnzoo", decoder=config.to_dict()).vocab_size == TOKENS


def test_configuration_errors():
    values = small_model("rcmha").config.to_dict()
    with pytest.raises(ValueError, match=r"unknown key model.colour"):
        AttnzooConfig(decoder=values | {"colour": "red"})
    with pytest.raises(ValueError, match=r"vocab_size=7 contradicts decoder.vocab_size=400"):
        AttnzooConfig(decoder=values, vocab_size=7)
    with pytest.raises(ValueError, match=r"decoder=None: give the fields of DecoderConfig"):
        AttnzooForCausalLM(AttnzooConfig())


@pytest.mark.parametrize("name", ["projection.query.weight", "passes", "mixing.position.gain"])
def test_incomplete_checkpoints_are_refused(name, tmp_path):
    """A weight, a buffer, a number that has another name in the file."""
    from safetensors.torch import load_file, save_file

    with newcomer("buffered") as kind:
        decoder = DecoderLM(DecoderConfig(vocab_size=TOKENS, model_dim=32, num_layers=2, attention=kind))
        AttnzooForCausalLM.of(decoder).save_pretrained(tmp_path)
        path = tmp_path / "model.safetensors"
        tensors = load_file(path)
        del tensors[f"model.blocks.1.attention.{name}"]
        save_file(tensors, path, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=rf"lacks model.blocks.1.attention.{name}"):
            AutoModelForCausalLM.from_pretrained(tmp_path)


IDS = torch.tensor([[5, 6, 7], [8, 9, 10]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": None}, r"input_ids has shape None"),
        ({"input_ids": IDS[0]}, r"input_ids has shape \(3,\)"),
        ({"inputs_embeds": torch.zeros(2, 3, 32)}, r"inputs_embeds: not supported"),
        ({"position_ids": IDS}, r"position_ids: not supported"),
        ({"output_attentions": True}, r"output_attentions=True is not supported"),
        ({"output_hidden_states": True}, r"output_hidden_states=True is not supported"),
        ({"cache": DynamicCache()}, r"cache is a DynamicCache; give attnzoo.hf.DecoderCache"),
        ({"cache": DecoderCache(), "use_cache": False}, r"use_cache=False with a cache"),
        ({"cache": DecoderCache(), "past_key_values": DecoderCache()}, r"cache and past_key_values are one"),
        ({"attention_mask": torch.ones(2, 4)}, r"attention_mask has shape \(2, 4\); it must be \(2, 3\)"),
        ({"attention_mask": torch.tensor([[0, 0, 0], [1, 1, 1]]), "use_cache": True}, r"a row without any token"),
        ({"labels": IDS[:, 1:]}, r"labels has shape \(2, 2\)"),
        ({"labels": IDS, "logits_to_keep": 1}, r"labels with logits_to_keep"),
    ],
)
def test_refused_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        wrapped()(**{"input_ids": IDS} | arguments)


def test_refused_uses_of_a_cache():
    model = wrapped()
    cache = model(IDS, use_cache=True, attention_mask=torch.tensor([[0, 1, 1], [1, 1, 1]])).cache
    with pytest.raises(ValueError, match=r"input_ids has 1 rows and the cache 2"):
        model(IDS[:1], cache=cache)
    with pytest.raises(ValueError, match=r"hides or shows tokens that the cache holds"):
        model(IDS, cache=cache, attention_mask=torch.ones(2, 6))
    for method in ("crop", "activate_past_recording"):
        with pytest.raises(ValueError, match=f"DecoderCache.{method} is not supported"):
            getattr(cache, method)(*([1] if method == "crop" else []))
    with pytest.raises(ValueError, match=r"ssisted generation is not supported"):
        model.generate(IDS[:1], assistant_model=wrapped(), max_new_tokens=3, do_sample=False)
    with pytest.raises(ValueError, match=r"new_num_tokens=410: the vocabulary of 400 is fixed"):
        model.resize_token_embeddings(TOKENS + 10)


def test_outputs():
    model = wrapped()
    out = model(IDS, past_key_values=DecoderCache(), logits_to_keep=1)
    assert out.logits.shape == (2, 1, TOKENS)
    assert out.cache.get_seq_length() == 3
    assert model(IDS).cache is None
    as_tuple = model(IDS, labels=IDS, return_dict=False)
    assert [value.dim() for value in as_tuple] == [0, 3]


def adapted(kind: str, seed: int = 2):
    torch.manual_seed(seed)
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(wrapped(kind), settings)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # which starts at zero: an adapter that changes nothing
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("kind", ["mha", "rcmha", "linear", "mixed"])
def test_adapters(kind, tmp_path):
    base, model = wrapped(kind), adapted(kind)
    inputs = batch(prompts())
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    model.train()
    model(**inputs, labels=labels).loss.backward()
    for name, parameter in model.named_parameters():
        assert ("lora_" in name) == parameter.requires_grad == (parameter.grad is not None), name
        assert parameter.grad is None or parameter.grad.abs().sum() > 0, name
    model.eval()
    with torch.no_grad():
        expected = model(**inputs).logits
        assert (expected - base(**inputs).logits).abs().max() > 1e-2
    text = greedy(model, prompts())
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(wrapped(kind), tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, expected)
    inside = wrapped(kind)
    inside.load_adapter(tmp_path / "adapter")
    merged = model.merge_and_unload()
    assert isinstance(merged, AttnzooForCausalLM)
    with torch.no_grad():
        assert torch.equal(inside(**inputs).logits, expected)
        difference = (merged(**inputs).logits - expected).abs().max() / expected.abs().max()
    assert difference < 1e-5
    assert greedy(merged, prompts()) == text
    merged.save_pretrained(tmp_path / "merged")
    assert generate(load_model(tmp_path / "merged"), prompts(), max_new_tokens=NEW) == text
