"""Reads and edits from text to text: `LanguageModel.generate(prompt, edits=..., read=..., spans=...)`."""

import pytest
import torch

from attnzoo.attention.edits import Add, EditRun, Edits, Hide, Map, Mass, Scale, TokenLayout, Where
from attnzoo.generation import token_spans
from tests.helpers.serving import lm_of, tokenizer

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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"edits": "scale"}, "edits='scale': give Edits"),
        ({"read": [Where()]}, "is no read and no edit"),
        ({"edits": EDITS}, "no span is called 'word'"),
        ({"edits": EDITS, "spans": {"word": "dog"}}, r"spans\['word'\]='dog' does not stand in the prompt"),
        ({"edits": EDITS, "spans": [{}, {}]}, "spans has 2 entries for 1 prompts"),
        ({"edits": [Add(Where(heads=9), 1.0)]}, "where.heads=9 is out of range: there are 4"),
        ({"read": [Mass()], "n": 2, "temperature": 1.0}, "n=2 with edits"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        lm_of("mha").generate(TEXTS[0], max_new_tokens=3, **options)
