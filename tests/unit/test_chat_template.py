"""Chat templates: the same text as transformers gives, and errors in their words."""

import subprocess
import sys
from datetime import datetime

import pytest

from attnzoo.gguf_file import read_gguf
from attnzoo.tokenizer.chat import MAX_SOURCE, ChatTemplate
from tests.helpers.chat_templates import CHATML, CONTROLS, CONVERSATIONS, HEADERS, INST, SPECIAL, render
from tests.helpers.gguf_files import smollm2
from tests.helpers.serving import tokenizer


@pytest.fixture(scope="module")
def reference():
    """What transformers makes of a template, with a tokenizer that knows nothing but its special tokens."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=words, **SPECIAL)

    def text(source: str, messages: list, add_generation_prompt: bool) -> str:
        return fast.apply_chat_template(
            messages, chat_template=source, tokenize=False, add_generation_prompt=add_generation_prompt
        )

    return text


def smollm2_template() -> str:
    """The template in a GGUF file of SmolLM2."""
    text = read_gguf(smollm2()).metadata["tokenizer.chat_template"]
    assert isinstance(text, str)
    return text


TEMPLATES = {"CHATML": CHATML, "INST": INST, "HEADERS": HEADERS, "CONTROLS": CONTROLS}


@pytest.mark.parametrize("name", [*TEMPLATES, "smollm2"])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_the_text_is_that_of_transformers(reference, name, add_generation_prompt):
    source = TEMPLATES.get(name) or smollm2_template()
    template = ChatTemplate(source, special=SPECIAL)
    for messages in CONVERSATIONS:
        expected = reference(source, messages, add_generation_prompt)
        assert template.render(messages, add_generation_prompt=add_generation_prompt) == expected
        assert messages[-1]["content"].strip() in expected or name == "CONTROLS"


@pytest.mark.heavy
def test_the_real_template():
    source = smollm2_template()
    assert render(source, [{"role": "user", "content": "Hi"}]) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_dates_are_of_now():
    assert f"Today Date: {datetime.now():%d %b %Y}" in render(HEADERS)


def test_special_tokens_are_the_tokenizers():
    class Foreign:
        chat_template = "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ messages[0].content }}"
        bos_id, eos_id, pad_id = None, 2, 0
        spelling = staticmethod(tokenizer().spelling)

    assert ChatTemplate.of(Foreign()).render([{"content": "x"}]) == "|</s>|<pad>|x"
    assert ChatTemplate.of(tokenizer()) is None


def test_a_refusal_of_the_template_keeps_its_words():
    with pytest.raises(ValueError, match=r"Conversation roles must alternate user/assistant/user/assistant/\.\.\.$"):
        render(INST, [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}])
    with pytest.raises(ValueError, match="xxx") as error:
        render("{{ raise_exception('x' * 100000) }}")
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{% if %}", r"Expected an expression.*line 1"),
        ("a\n{% for x in y %}", r"endfor.*line 2"),
        ("{{ x", "line 1"),
        ("{% unheard %}", "unheard"),
        ("{{ 'a' | urlize }}", "No filter named 'urlize'"),
        ("{{ " + "(" * 5000 + ")" * 5000 + " }}", "not valid"),
        ("{% if x %}" * 2000 + "{% endif %}" * 2000, "not valid"),
        ("x" * (MAX_SOURCE + 1), f"at most {MAX_SOURCE}"),
    ],
    ids=lambda text: text[:20],
)
def test_a_broken_template_is_refused_at_once(source, words):
    with pytest.raises(ValueError, match=words):
        ChatTemplate(source, special={})


def test_without_jinja2_the_error_says_what_to_install():
    program = "import sys; sys.modules['jinja2'] = None\nfrom attnzoo.tokenizer.chat import ChatTemplate\n"
    program += "try:\n    ChatTemplate('x', special={})\nexcept ValueError as error:\n    print(error)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "pip install 'attnzoo[weights]'" in done.stdout
