"""`attnzoo generate` and `attnzoo chat`: what they write, and how a conversation goes on."""

import io
import json
import signal
import sys

import pytest

import attnzoo
from attnzoo.cli import main
from attnzoo.language_model import LanguageModel
from tests.helpers import serving
from tests.helpers.serving import chat_tokenizer, small_model


class Recording(LanguageModel):
    """Remembers the conversations that it was asked to go on with."""

    def stream_chat(self, messages, *arguments, **options):
        self.asked = [*getattr(self, "asked", []), [dict(message) for message in messages]]
        return super().stream_chat(messages, *arguments, **options)


class Terminal(io.StringIO):
    """Text of somebody who sits there."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(serving.export(tmp_path_factory.mktemp("tiny") / "export", "mha"))


@pytest.fixture
def chatty(monkeypatch):
    """A model with a chat template, which `attnzoo.load` gives whatever it is asked for."""
    lm = Recording(small_model("rcmha", max_len=256), chat_tokenizer())
    monkeypatch.setattr(attnzoo, "load", lambda name, **options: lm, raising=False)
    return lm


def test_generate_streams_what_python_generates(checkpoint, capsys, monkeypatch):
    lm = attnzoo.load(checkpoint)
    options = {"max_new_tokens": 9, "temperature": 0.7, "seed": 3, "cache": "streaming", "keep_ratio": 0.5}
    words = [f"{key}={value}" for key, value in options.items()]
    expected = lm.generate("The slots", **options)
    assert main(["generate", checkpoint, "The slots", *words]) == 0
    assert capsys.readouterr().out == f"{expected.text}\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO("The slots"))
    assert main(["generate", checkpoint, "-", "--json", *words, "logprobs=1"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["outputs"]
    assert (found["text"], found["token_ids"]) == (expected.text, list(expected.token_ids))
    assert found["cache"]["policy"] == expected.cache.policy
    assert len(found["logprobs"]) == len(expected.token_ids)
    assert main(["generate", checkpoint, "The slots", *words, "n=2"]) == 0
    assert capsys.readouterr().out.startswith("[1]\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tokens=3"], "unknown option 'tokens'"),
        (["max_new_tokens=0"], "max_new_tokens=0 must be at least 1"),
        (["max_tokens"], "'max_tokens' is not of the form key=value, for example max_new_tokens=64"),
        (["keep_ratio=0.5"], "name one, cache="),
        (["logprobs=2"], "logprobs=2 is printed as JSON only; add --json"),
        (["cache=h2o"], "cache.policy='h2o' is not known"),
        (["stop=5"], "stop=5 must be a string"),
        (["prompt=x"], "unknown option 'prompt'"),
        (["self=x"], "unknown option 'self'"),
        (["--json", "batch_size=4"], "unknown option 'batch_size'"),
        (["generation_config={n: 2}"], "unknown option 'generation_config'"),
        (["--dtype", "int9"], "unknown dtype 'int9'"),
        (["--device", "tpu0"], "device='tpu0' cannot be used"),
    ],
)
def test_wrong_options_are_named(words, message, checkpoint, capsys):
    assert main(["generate", checkpoint, "The", *words]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("attnzoo generate: error: ")
    assert message in captured.err
    assert not captured.out


def test_the_usual_length_is_what_the_context_has_room_for(checkpoint, capsys):
    """128 new tokens were never asked for: a model of 64 positions writes as many as it can."""
    lm = attnzoo.load(checkpoint)
    assert lm.config.max_positions == 64
    assert main(["generate", checkpoint, "The slots", "--json", "ignore_eos=true"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["prompt_token_ids"]) + len(found["outputs"][0]["token_ids"]) == 64
    assert main(["generate", checkpoint, "word " * 90]) == 2
    assert "shorten the prompt" in capsys.readouterr().err


def test_a_terminal_gets_no_control_characters(monkeypatch):
    from attnzoo.cli.text import show

    for kind, expected in ((Terminal, "a\ufffd[31m\tb\ufffd\ufffd\n"), (io.StringIO, "a\x1b[31m\tb\r\x9b\n")):
        monkeypatch.setattr(sys, "stdout", kind())
        show("a\x1b[31m\tb\r\x9b\n")
        assert sys.stdout.getvalue() == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["max_new_tokens=2"], "the prompt is missing: 'max_new_tokens=2' is an option; write it after the text"),
        (["keep_ratio=0.5", "cache=d2o"], "'keep_ratio=0.5' is an option"),
        (["cache=d2o"], "'cache=d2o' is an option"),
        (["def", "max_new_tokens="], "max_new_tokens= has no value; write max_new_tokens=null"),
        ([""], "the prompt is empty; give at least one character"),
        (["-"], "stdin is empty, and the prompt was to be read from it; give at least one character"),
    ],
)
def test_words_that_are_no_prompt(words, message, chatty, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert main(["generate", "tiny", *words]) == 2
    captured = capsys.readouterr()
    assert (captured.out, message in captured.err) == ("", True)
    monkeypatch.setattr(sys, "stdin", io.StringIO("max_new_tokens=2"))
    assert main(["generate", "tiny", "-", "max_new_tokens=2"]) == main(["generate", "tiny", "a=2", "n=1"]) == 0


def test_a_conversation_from_a_file(chatty, capsys, monkeypatch):
    """A line is a message; answers go to stdout, and belong to what the next message is answered with."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n\nAgain\n/reset\nNew\n/exit\nnever read\n"))
    assert main(["chat", "tiny", "max_new_tokens=4", "--system", "Be brief."]) == 0
    captured = capsys.readouterr()
    system = {"role": "system", "content": "Be brief."}
    said = [[message["content"] for message in asked] for asked in chatty.asked[1:]]  # the first one tries the options
    answer = chatty.chat([system, {"role": "user", "content": "Hello"}], max_new_tokens=4).text
    assert said == [["Be brief.", "Hello"], ["Be brief.", "Hello", answer, "Again"], ["Be brief.", "New"]]
    assert captured.out.startswith(f"{answer}\n")
    assert captured.err == ""


def test_lines_that_are_no_messages_are_named_and_the_conversation_goes_on(chatty, capsys, monkeypatch):
    """Kills: a byte that is no UTF-8 called a lone surrogate of the template, which ends all; /nope for the model."""
    lines = "Hello\n/nope\nfr\udcfch\nAgain\n"
    for stdin, status in ((io.StringIO(lines), 1), (Terminal(lines), 0)):
        monkeypatch.setattr(sys, "stdin", stdin)
        assert main(["chat", "tiny", "max_new_tokens=4"]) == status
        said = capsys.readouterr().err
        assert "unknown command /nope; known: /reset, /exit" in said
        assert "the line is not UTF-8: byte 0xFC at character 3; convert it" in said
        assert [message["content"] for message in chatty.asked[-1]][::2] == ["Hello", "Again"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("fr\udcfch"))
    assert main(["generate", "tiny", "-"]) == 2
    assert "stdin is not UTF-8: byte 0xFC at character 3; convert it, for example with iconv" in capsys.readouterr().err


def test_what_cannot_be_answered_ends_a_file_and_not_a_terminal(chatty, capsys, monkeypatch):
    long = "word " * 300
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{long}\nHi\n"))
    assert main(["chat", "tiny", "max_new_tokens=4"]) == 2
    assert "attnzoo chat: error: the model's context is 256 tokens" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdin", Terminal(f"{long}\nHi\n"))
    assert main(["chat", "tiny", "max_new_tokens=4"]) == 0
    assert "/reset starts a new conversation" in capsys.readouterr().err
    assert [message["content"] for message in chatty.asked[-1]] == ["Hi"]
    assert main(["chat", "tiny", "max_new_tokens=0"]) == 2


def test_ctrl_c_stops_an_answer(chatty, capsys, monkeypatch):
    """What was written of it stays; where nobody sits there it ends the command."""

    class Interrupting(io.StringIO):
        def write(self, text: str) -> int:
            written = super().write(text)
            if text.strip() not in ("", ">"):
                signal.signal(signal.SIGINT, signal.default_int_handler)
                monkeypatch.setattr(sys, "stdout", sys.__stdout__)  # interrupts once
                signal.raise_signal(signal.SIGINT)
            return written

    before = signal.getsignal(signal.SIGINT)
    try:
        out = Interrupting()
        monkeypatch.setattr(sys, "stdin", Terminal("Hello\nAgain\n"))
        monkeypatch.setattr(sys, "stdout", out)
        assert main(["chat", "tiny", "max_new_tokens=40"]) == 0
        written = out.getvalue().removeprefix("> ")
        assert [message["content"] for message in chatty.asked[-1]] == ["Hello", written, "Again"]
        whole = chatty.chat([{"role": "user", "content": "Hello"}], max_new_tokens=40).text
        assert whole.startswith(written)
        assert written != whole
        monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\nAgain\n"))
        monkeypatch.setattr(sys, "stdout", Interrupting())
        with pytest.raises(KeyboardInterrupt):
            main(["chat", "tiny", "max_new_tokens=40"])
    finally:
        signal.signal(signal.SIGINT, before)
