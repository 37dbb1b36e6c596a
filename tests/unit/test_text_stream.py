"""Stop strings and half characters: what is shown is final, and nothing final is withheld."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnzoo.models.sampling import TokenLogprobs
from attnzoo.tokenizer.text_stream import TextStream


class Bytes:
    """A tokenizer whose tokens are the bytes of UTF-8, decoded as the real one does."""

    def decoder(self, *, start: bool = True):
        import codecs

        decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        return type("D", (), {"push": lambda _, t: decode(bytes([t])), "finish": lambda _: decode(b"", True)})()


def stream(data: bytes, stop: tuple[str, ...]) -> tuple[list[str], bool]:
    text = TextStream(Bytes(), stop)
    parts = []
    for byte in data:
        parts.append(text.push(byte))
        if text.stopped:
            break
    parts.append(text.finish())
    return parts, text.stopped


def first_stop(text: str, stop: tuple[str, ...]) -> str | None:
    """Text before the stop string that is complete first (of those, the one that begins first)."""
    for end in range(len(text) + 1):
        starts = [end - len(s) for s in stop if text[:end].endswith(s)]
        if starts:
            return text[: min(starts)]
    return None


ALPHABET = "abé🙂"


@given(st.text(ALPHABET, max_size=25), st.lists(st.text(ALPHABET, min_size=1, max_size=4), max_size=3))
def test_any_text_and_stop_strings(text, stop):
    parts, stopped = stream(text.encode(), tuple(stop))
    expected = first_stop(text, tuple(stop))
    assert stopped == (expected is not None)
    assert "".join(parts) == (text if expected is None else expected)


@given(st.text(ALPHABET, max_size=25), st.lists(st.text(ALPHABET, min_size=1, max_size=4), min_size=1, max_size=3))
def test_what_is_held_back_could_begin_a_stop_string(text, stop):
    out, fed = "", ""
    stream_ = TextStream(Bytes(), tuple(stop))
    for char in text:
        fed += char
        for byte in char.encode():
            out += stream_.push(byte)
        if stream_.stopped:
            return
        held = fed[len(out) :]
        assert held == "" or any(s.startswith(held) for s in stop)


def test_a_stop_string_may_begin_inside_another_try():
    assert stream(b"aaab!", ("aab",)) == (["", "", "a", "", ""], True)


def test_half_a_character_is_held_and_replaced_at_the_end():
    assert stream("é".encode()[:1], ()) == (["", "�"], False)


def test_a_stop_string_in_the_rest_of_the_text():
    assert stream(b"a" + "é".encode()[:1], ("�",)) == (["a", "", ""], True)


@pytest.mark.parametrize(("stop", "kept"), [((), 4), (("cd",), 2), (("bc",), 1), (("xx",), 4)])
def test_logprobs_come_with_their_text(stop, kept):
    text = TextStream(Bytes(), stop)
    out, shown = [], ""
    for byte in b"abcd":
        shown += text.push(byte, TokenLogprobs(byte, -1.0, []))
        if text.stopped:
            break
        out += text.take_logprobs(finished=False)
        assert len(out) == len(shown)
    text.finish()
    out += text.take_logprobs(finished=True)
    assert [entry.token for entry in out] == list(b"abcd"[:kept])
    assert [entry.offset for entry in out] == list(range(kept))


@pytest.mark.parametrize(
    ("data", "stop", "options", "expected"),
    [
        (b"ab", (), [{}, {}], [("a", None), ("b", None)]),
        (b"ab", (), [{}, {"last": True}], [("a", None), ("b", "length")]),
        (b"ab", (), [{}, {"ends": True}], [("a", None), ("", "stop")]),
        (b"ab", ("b",), [{}, {"last": True}], [("a", None), ("", "stop")]),
        (b"ab", ("bc",), [{}, {"last": True}], [("a", None), ("b", "length")]),
        (b"ab", ("ac",), [{}, {"ends": True}], [("", None), ("a", "stop")]),
        (b"a\xc3", ("\ufffd",), [{}, {"last": True}], [("a", None), ("", "stop")]),
    ],
)
def test_why_a_text_ends(data, stop, options, expected):
    text = TextStream(Bytes(), stop)
    found = [
        text.advance(byte, **({"ends": False, "last": False} | kw)) for byte, kw in zip(data, options, strict=True)
    ]
    assert found == expected
