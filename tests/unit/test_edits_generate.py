"""Reads and edits from text to text: `LanguageModel.generate(prompt, edits=..., read=..., spans=...)`."""

import itertools
import random

import pytest
import torch

from attnzoo.attention.edits import Add, After, EditRun, Edits, Hide, Map, Mass, Scale, TokenLayout, Where
from attnzoo.language_model import LanguageModel
from attnzoo.tokenizer.chat import ChatTemplate
from attnzoo.tokenizer.spans import message_spans, token_spans
from tests.helpers.serving import chat_tokenizer, lm_of, small_model, tokenizer

TEXTS = ["The slots of the state are numbered", "Der Zustand einer Folge", "a state"]
EDITS = Edits(Scale(Where(keys="word"), 4.0), Hide(Where(layers=0, queries="generated", keys=0)))
READ = [Mass(bins={"word": "word"}), Map(Where(layers=1), dtype="fp32")]


@pytest.mark.parametrize("kind", ["mha", "rcmha", "window"])
@torch.no_grad()
def test_texts_are_those_of_whole_passes(kind):
    """Every token again by the parallel form over all before it. Kills: decode without edits; an ended row that is read
    on; rows of unequal prompts that take each other's spans."""
    lm = lm_of(kind)
    spans = [{"word": "state"}, {"word": "Zustand"}, {"word": (0, 2)}]
    found = lm.generate(TEXTS, max_new_tokens=8, ignore_eos=True, edits=EDITS, read=READ, spans=spans)
    plain = lm.generate(TEXTS, max_new_tokens=8, ignore_eos=True)
    assert [each.token_ids for each in found] != [each.token_ids for each in plain]
    assert plain[0].reading is None
    for each, named in zip(found, spans, strict=True):
        ids = list(each.prompt_token_ids)
        layout = TokenLayout(len(ids), {"word": token_spans(tokenizer(), ids, named["word"], "word")})
        plan = lm.model.plan_edits(Edits(*EDITS.items, *READ), layout, 7)
        run = None
        for token in each.token_ids:
            run = EditRun(plan)
            logits = lm.model(torch.tensor([ids]), edits=[run])[0, -1]
            assert int(logits[: tokenizer().vocab_size].argmax()) == token
            ids.append(token)
        for layer in (0, 1):
            torch.testing.assert_close(
                each.reading[layer].mass["word"], run.reading[layer].mass["word"], rtol=1e-4, atol=1e-5
            )
        torch.testing.assert_close(each.reading[1].map, run.reading[1].map, rtol=1e-4, atol=1e-5)
        assert each.reading.nbytes == plan.cost.returned_bytes


def test_with_a_cache_a_stream_and_a_row_that_ends_early():
    lm = lm_of("mha")
    options = {"max_new_tokens": 6, "edits": EDITS, "read": READ, "spans": {"word": "state"}, "ignore_eos": True}
    cache = {"policy": "d2o", "keep_ratio": 0.5, "min_tokens": 0}
    (first, last), alone = (
        lm.generate(TEXTS[::2], cache=cache, **options),
        lm.generate(TEXTS[2], cache=cache, **options),
    )
    assert last.token_ids == alone.token_ids
    assert first.reading[1].evicted.any()
    stream = lm.stream(TEXTS[0], **options)
    assert "".join(stream) == stream.result.text == lm.generate(TEXTS[0], **options).text
    assert len(stream.result.reading) == 2
    one, other = lm.generate(TEXTS[::2], stop=stream.result.text[:2], **options)
    assert len(one.token_ids) < len(other.token_ids)
    for each in (one, other):
        read = each.reading[1].results[1].queries_Q
        assert read.tolist() == list(range(each.prompt_tokens + len(each.token_ids) - 1))


def test_chats_name_their_messages():
    """As the server does: roles, messages by number, and names of the caller's own, which take precedence; alone, in a
    batch and as a stream. Kills: names of another conversation; names without messages; own names that lose."""
    lm = LanguageModel(small_model("mha"), chat_tokenizer())
    talks = [
        [{"role": "system", "content": "user: be a state"}, {"role": "user", "content": "the slots, the user"}],
        [
            {"role": "user", "content": "Der Zustand"},
            {"role": "all", "content": "a"},
            {"role": "user", "content": "state"},
        ],
    ]
    edits = [
        Scale(Where(keys="user"), 4.0),
        Add(Where(layers=0, queries=After("messages[0]"), keys="messages[1]"), 2.0),
    ]
    read = [
        Mass(bins={"all of them": "user", "first": "messages[0]", "word": "word"}),
        Map(Where(layers=1), dtype="fp32"),
    ]
    options = {"max_new_tokens": 6, "ignore_eos": True, "edits": edits, "read": read}
    spans = [{"word": "slots"}, {"word": (1, 3), "messages[1]": "Zustand"}]
    many = lm.chat(talks, spans=spans, **options)
    for talk, named, found in zip(talks, spans, many, strict=True):
        alone = lm.chat(talk, spans=named, **options)
        stream = lm.stream_chat(talk, spans=named, **options)
        assert "".join(stream) == alone.text == found.text
        ids = list(found.prompt_token_ids)
        places = message_spans(lm._chat.template, lm.tokenizer, talk, ids)
        assert set(places) >= {"messages[0]", "messages[1]", "user"}
        explicit = {name: at for name, at in places.items() if name != "all"} | named
        by_hand = lm.generate(ids, spans=explicit, **options)
        plain = lm.generate(ids, max_new_tokens=6, ignore_eos=True)
        assert found.token_ids == by_hand.token_ids != plain.token_ids
        torch.testing.assert_close(found.reading[1].map, by_hand.reading[1].map, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.reading[0].mass, by_hand.reading[0].mass, rtol=1e-4, atol=1e-5)
    with pytest.raises(
        ValueError, match=r"prompts\[1\]: edits\[0\].*no span is called 'system'; known: all, generated, messages"
    ):
        lm.chat(talks, edits=[Hide(Where(keys="system"))])
    with pytest.raises(ValueError, match="stream_chat takes one conversation, not a list of 2; use chat"):
        lm.stream_chat(talks)
    with pytest.raises(ValueError, match=r"messages\[1\]\[0\].role=None must be a text"):
        lm.chat([talks[0], [{"content": "a"}]])
    assert lm.chat([talks[0]], max_new_tokens=2)[0] == lm.chat(talks[0], max_new_tokens=2)


def test_contents_that_are_no_texts_have_no_names():
    """A template may write a message without a text, or with parts: the others keep their names."""
    words = chat_tokenizer()
    template = ChatTemplate("{% for m in messages %}{{ m.role }}: {{ m.content or m.name }};{% endfor %}", special={})
    talk = [
        {"role": "user", "content": "the state"},
        {"role": "tool", "name": "slots"},
        {"role": "user", "content": [{"type": "text", "text": "a"}]},
        {"role": "assistant", "content": "Zustand"},
        {"role": "messages[0]", "content": "run"},
    ]
    ids = words.encode(str(template.render(talk)), bos=True)
    found = message_spans(template, words, talk, ids)
    certain = {name for name, each in found.items() if isinstance(each, list)}
    assert certain == {"messages[0]", "messages[3]", "messages[4]", "assistant"}
    lm = LanguageModel(small_model("mha"), words)
    silent, edits = [{"role": "user", "content": ""}], [Hide(Where(keys="user"))]
    why = r"edits\[0\].*the tokens of 'user' are not known: the content of messages\[0\] is empty.*; name them by spans"
    with pytest.raises(ValueError, match=why):
        lm.chat(silent, edits=edits)
    assert lm.chat(silent, spans={"user": [0, 2]}, edits=edits, max_new_tokens=2).token_ids


def test_a_word_is_all_of_its_tokens():
    ids = tokenizer().encode("the state of the Zustand", bos=True)
    whole = b"".join(map(tokenizer().token_bytes, ids))
    for word in ("state", "the", "Zustand", "of the", "tat"):
        found = token_spans(tokenizer(), ids, word, "word")
        assert len(found) == whole.count(word.encode())
        for start, stop in found:
            inside = [tokenizer().token_bytes(token) for token in ids[start:stop]]
            assert word.encode() in b"".join(inside)
            assert word.encode() not in b"".join(inside[1:])
            assert word.encode() not in b"".join(inside[:-1])


def test_texts_that_overlap_themselves_are_found_everywhere():
    """Against a search at every byte, and in time that is no square of the length. Kills: a place that begins within
    another one left out."""
    draw, letters = random.Random(0), chat_tokenizer()
    for _ in range(60):
        text = "".join(draw.choice("ab") for _ in range(24))
        ids = letters.encode(text, bos=True)
        pieces = list(map(letters.token_bytes, ids))
        whole, start = b"".join(pieces), draw.randrange(20)
        word = text[start : start + draw.randint(1, 5)].encode()
        at = [len(b"".join(pieces[:n])) for n in range(len(pieces) + 1)]
        named = {
            n
            for place in range(len(whole))
            if whole.startswith(word, place)
            for n in range(len(pieces))
            if at[n] < place + len(word) and place < at[n + 1]
        }
        found = token_spans(letters, ids, word.decode(), "word")
        assert {n for a, b in found for n in range(a, b)} == named
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(found))
    many = letters.encode("ab" * 3000, bos=True)
    assert len(token_spans(letters, many, "ab" * 1000, "word")) == 1
    lm = LanguageModel(small_model("mha"), letters)
    edits = [Scale(Where(keys="messages[0]"), 4.0)]
    talk = [{"role": "user", "content": "ababa"}, {"role": "user", "content": "xababababax"}]
    ids = lm.chat(talk, max_new_tokens=1, edits=edits).prompt_token_ids
    ((start, stop),) = message_spans(lm._chat.template, letters, talk, ids)["messages[0]"]
    assert b"ababa" in b"".join(map(letters.token_bytes, ids[start:stop]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"edits": "scale"}, "edits='scale': give Edits"),
        ({"read": [Where()]}, "is no read and no edit"),
        ({"edits": EDITS}, "no span is called 'word'"),
        ({"edits": EDITS, "spans": {"word": "dog"}}, r"spans\['word'\]='dog' does not stand in the prompt"),
        ({"edits": EDITS, "spans": [{}, {}]}, "spans has 2 entries for 1 prompts"),
        ({"edits": EDITS, "spans": 3}, "spans=3: give a mapping of names"),
        ({"edits": EDITS, "spans": ["state"]}, r"spans\[0\]='state': give a mapping of names, or None"),
        ({"read": [Map(), Hide(Where())]}, r"read\[1\]=Hide\(...\) is an edit; move it to edits"),
        ({"edits": [Add(Where(heads=9), 1.0)]}, "where.heads=9 is out of range: there are 4"),
        ({"read": [Mass()], "n": 2, "temperature": 1.0}, "n=2 with read: a run reads one sequence"),
        ({"edits": [Scale(Where(keys=0), 1e39)]}, r"edits\[0\].scale.factor=1e\+39 overflows in layer 0"),
        (
            {"edits": [Scale(Where(keys=0), 1e19, renormalise=False)] * 4},
            r"edits\[1\].scale makes with the edits before",
        ),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        lm_of("mha").generate(TEXTS[0], max_new_tokens=3, **options)


@torch.no_grad()
def test_logits_that_edits_overflow_name_the_edits():
    """Numbers that a plan lets pass, in a model of large values."""
    lm = LanguageModel(small_model("mha"), tokenizer())
    for block in lm.model.layers():
        block.attention.projection.value.weight.mul_(1e12)
    assert len(lm.generate(TEXTS[0], max_new_tokens=2, ignore_eos=True).token_ids) == 2
    edits = [Scale(Where(keys=0), factor, renormalise=False) for factor in (1e19, 1e12)]
    with pytest.raises(ValueError, match="not finite numbers with these edits: their numbers, alone or together, are"):
        lm.generate(TEXTS[0], max_new_tokens=2, ignore_eos=True, edits=edits)
