"""Prompts that are partly embeddings: the class, the generation loop, and conversations in Python."""

import pytest
import torch

from attnzoo.attention.edits import Mass, Where
from attnzoo.language_model import LanguageModel
from attnzoo.models import DecoderLM, Embedded, EmbeddedPrompt, generate
from attnzoo.models.embedded import prompt_tensor
from attnzoo.tokenizer import SentencePieceTokenizer
from attnzoo.tokenizer.chat_tokens import ChatEncoder
from attnzoo.tokenizer.spans import message_spans
from tests.helpers.serving import chat_tokenizer, lm_of, small_model, tokenizer_path

WIDTH = 32


def rows(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed)) * 0.3


def whole_forward(model: DecoderLM, prompt: EmbeddedPrompt, count: int) -> list[int]:
    """Greedy tokens, each by the parallel form over everything before it: no state, no cache."""
    table = model.embedding.weight
    pieces, at = [], 0
    for part in prompt.embedded:
        pieces += [table[list(prompt.ids[at : part.start])], part.rows_MD]
        at = part.stop
    pieces.append(table[list(prompt.ids[at:])])
    found: list[int] = []
    for _ in range(count):
        found.append(int(model(torch.cat([*pieces, table[found]])[None])[0, -1].argmax()))
    return found


def test_a_prompt_is_a_sequence_of_ids_whose_slices_keep_what_stands_there() -> None:
    first, second = rows(3), rows(2, seed=1)
    prompt = EmbeddedPrompt(
        [[5, 6], Embedded(first, name="a"), [7], Embedded(second, name="b"), Embedded(first, name="a")]
    )
    assert list(prompt) == [5, 6, -1, -1, -1, 7, -1, -1, -1, -1, -1]
    assert (len(prompt), prompt[1], prompt[-1], prompt.tokens) == (11, 6, -1, [5, 6, 7])
    assert prompt.spans == {"a": [(2, 5), (8, 11)], "b": [(6, 8)]}
    model = small_model("mha")
    whole = prompt_tensor(model, [prompt])
    assert torch.equal(whole[0, 2:5], first)
    assert torch.equal(whole[0, [0, 1, 5]], model.embedding.weight[[5, 6, 7]])
    for start in range(len(prompt)):
        for stop in range(start + 1, len(prompt) + 1):
            part = prompt[start:stop]
            assert list(part) == list(prompt)[start:stop]
            read = prompt_tensor(model, [part])
            assert torch.equal(read if part.embedded else model.embed(read), whole[:, start:stop])
    padded = prompt_tensor(model, [prompt, [9, 8]])
    assert torch.equal(padded[0], whole[0])
    assert torch.equal(padded[1, :2], model.embedding.weight[[9, 8]])
    digests = {Embedded(x).digest for x in (first, first.clone(), first + 1, first[:2], first.double())}
    assert len(digests) == 4
    assert EmbeddedPrompt.around([[1], [2, 3]], [Embedded(second)]).ids == (1, -1, -1, 2, 3)


def test_what_makes_no_prompt_is_refused() -> None:
    for given, message in (
        ([[1.0]], "embeddings are list; give a tensor"),
        (torch.zeros(4), r"embeddings are torch.float32 \(4,\); give a tensor \[rows, model_dim\]"),
        (torch.zeros(2, 3, dtype=torch.long), r"embeddings are torch.int64 \(2, 3\)"),
        (torch.zeros(0, 3), r"embeddings of shape \(0, 3\) are empty"),
        (torch.full((1, 3), float("nan")), "embeddings hold NaN or infinity"),
    ):
        with pytest.raises(ValueError, match=message):
            Embedded(given)
    for parts, message in (
        ([[-1]], "prompt token -1 is no token id; .* embeddings as Embedded"),
        ([[True]], "prompt token True is no token id"),
        ([["a"]], "prompt token 'a' is not an integer"),
        ([Embedded(torch.ones(1, 3)), Embedded(torch.ones(1, 4))], r"embeddings of widths \[3, 4\] in one prompt"),
    ):
        with pytest.raises(ValueError, match=message):
            EmbeddedPrompt(parts)
    lm, narrow = lm_of("mha"), EmbeddedPrompt([[5], Embedded(torch.ones(2, 7))])
    with pytest.raises(ValueError, match=r"embeddings of shape \(2, 7\) in the prompt; this model's have 32 numbers"):
        lm.generate(narrow)
    good = EmbeddedPrompt([[5], Embedded(rows(2))])
    with pytest.raises(ValueError, match="an EmbeddedPrompt has no log probabilities"):
        lm.logprobs(good)
    with pytest.raises(ValueError, match="no slices of step 2"):
        good[::2]
    # Whoever reads the ids alone refuses them.
    for lost in (list(good), torch.tensor(list(good)).tolist()):
        with pytest.raises(ValueError, match="prompt token -1 is outside the vocabulary"):
            lm.generate([lost])
    with pytest.raises(ValueError, match="vocabulary"):
        lm.model.embed(torch.tensor([list(good)]))


@pytest.mark.parametrize("kind", ["mha", "rcmha", "mixed"])
def test_generation_continues_what_the_parallel_form_predicts(kind: str) -> None:
    """Beside prompts of ids, of other lengths, and where the embeddings end the prompt."""
    model = small_model(kind)
    prompts = [
        EmbeddedPrompt([[5, 6, 7], Embedded(rows(4)), [8]]),
        EmbeddedPrompt([Embedded(rows(3, seed=2)), [9, 9, 9, 9, 9], Embedded(rows(2, seed=3))]),
    ]
    wanted = [whole_forward(model, prompt, 7) for prompt in prompts]
    plain = generate(model, [[11, 12]], max_new_tokens=7)[0]
    assert generate(model, [prompts[0], [11, 12], prompts[1]], max_new_tokens=7) == [wanted[0], plain, wanted[1]]
    zeroed = [EmbeddedPrompt([[5, 6, 7], Embedded(torch.zeros(4, WIDTH)), [8]])]
    assert generate(model, zeroed, max_new_tokens=7)[0] != wanted[0], "the embeddings do not matter"
    same = EmbeddedPrompt([[5], Embedded(model.embedding.weight[[6, 7]].clone()), [8]])
    assert generate(model, [same], max_new_tokens=7) == generate(model, [[5, 6, 7, 8]], max_new_tokens=7)


def test_a_chat_takes_embeddings_among_its_texts() -> None:
    lm = LanguageModel(small_model("rcmha"), chat_tokenizer())
    first, second = rows(3), rows(2, seed=1)

    def say(*parts: object) -> list[dict]:
        found = [
            {"type": "text", "text": x} if isinstance(x, str) else {"type": "embeddings", "embeddings": x}
            for x in parts
        ]
        return [{"role": "user", "content": found}]

    encode = chat_tokenizer().encode
    begin, end = chat_tokenizer().bos_id, chat_tokenizer().eos_id
    found = lm.chat(say("How", "many?", first, "Or", second), max_new_tokens=5)
    by_hand = EmbeddedPrompt(
        [
            [begin, *encode("user: How\nmany?")],
            Embedded(first),
            encode("Or"),
            Embedded(second),
            [end, *encode("\nassistant:")],
        ]
    )
    assert found.prompt_token_ids == by_hand.ids
    assert found.token_ids == lm.generate(by_hand, max_new_tokens=5).token_ids
    assert found.prompt_tokens == len(by_hand)
    # What a message spells cannot take a mark's place, and control tokens stay text on both sides of one.
    for text in ("\ue0000\ue001", "</s>"):
        again = lm.chat(say(text, first, text), max_new_tokens=1)
        assert again.prompt_token_ids.count(-1) == 3
        assert again.prompt_token_ids.count(end) == 1
    # Attention to them is read by their name, and messages keep theirs where no embeddings are among their words.
    talk = [{"role": "system", "content": "Be brief."}, *say("a", first, "b")]
    read = lm.chat(
        talk, max_new_tokens=2, read=[Mass(where=Where(layers=0), bins={"data": "embeddings[0]", "rules": "system"})]
    )
    ids = read.prompt_token_ids
    mass = read.reading[0].results[0].values
    assert set(mass) >= {"data", "rules"}
    at = ids.index(-1)
    spans = lm.chat(
        talk, max_new_tokens=2, read=[Mass(where=Where(layers=0), bins={"data": "x"})], spans={"x": [at, at + 3]}
    )
    torch.testing.assert_close(mass["data"], spans.reading[0].results[0].values["data"], rtol=0, atol=1e-6)
    assert mass["data"].max() > 0.05
    with pytest.raises(ValueError, match=r"messages\[1\]"):
        lm.chat(talk, max_new_tokens=2, read=[Mass(where=Where(layers=0), bins={"x": "messages[1]"})])
    for wrong, message in (
        (say("a", torch.zeros(2, 7)), r"embeddings of shape \(2, 7\)"),
        (say("a", [1.0]), r"messages\[0\].content\[1\].embeddings: embeddings are list"),
        ([{"role": "user", "content": [*say(first)[0]["content"], {"type": "image"}]}], r"content\[1\]=.* neither"),
    ):
        with pytest.raises(ValueError, match=message):
            lm.chat(wrong)


def test_a_template_that_drops_or_repeats_contents_is_refused() -> None:
    for template, fits in (
        ("{% for m in messages %}{{ m.content | trim }}{% endfor %}", True),
        ("{{ messages[0].content[:5] }}", False),
        ("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}", False),
        ("{{ messages[1].content }}{{ messages[0].content }}", False),
    ):
        words = SentencePieceTokenizer.load(tokenizer_path())
        words.chat_template = template
        lm = LanguageModel(small_model("mha"), words)
        part = {"type": "embeddings", "embeddings": rows(2)}
        talk = [{"role": "user", "content": [{"type": "text", "text": " word "}, part]}] * 2
        if fits:
            assert lm.chat(talk, max_new_tokens=1).prompt_token_ids.count(-1) == 4
        else:
            with pytest.raises(ValueError, match="leaves out, repeats or moves the contents"):
                lm.chat(talk)


def test_no_text_is_found_across_embeddings() -> None:
    chat = ChatEncoder.of(chat_tokenizer())
    messages = [{"role": "user", "content": "step self"}]
    ids = chat.encode(messages)
    ((start, stop),) = message_spans(chat.template, chat_tokenizer(), messages, ids)["messages[0]"]
    assert stop - start > 2
    for cut, found in ((start, [(start + 2, stop + 2)]), (stop, [(start, stop)]), (start + 1, None)):
        prompt = EmbeddedPrompt([ids[:cut], Embedded(rows(2)), ids[cut:]])
        place = message_spans(chat.template, chat_tokenizer(), messages, prompt)["messages[0]"]
        assert place == found if found else not isinstance(place, list)
