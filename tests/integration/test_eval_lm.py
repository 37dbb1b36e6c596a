"""Our models behind lm-eval's interface: the numbers of lm-eval's own adapter for transformers, and the command."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
import yaml

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'attnzoo[eval]'")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import AddedToken
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from attnzoo.checkpoint import load_model, load_tokenizer, save_model
from attnzoo.models import DecoderConfig, DecoderLM
from scripts.lm_adapter import AdaptedLM, Generation
from tests.helpers import foreign_tokenizers as foreign
from tests.helpers.forked import start_script
from tests.helpers.training import environment

ROOT = Path(__file__).resolve().parents[2]
TASKS = ROOT / "tests/data/eval"
LENGTH = 47
CLOSE = 1e-4
"""Two implementations of one model in float32; sums of up to some hundred log probabilities."""
PAIRS = [
    ("The quick brown", " fox"),
    ("The quick", " brown fox"),  # the same text as before, of which more is asked
    ("The quick brown ", "fox jumps"),
    ("", "over the lazy dog"),
    ("def read(path):\n", "    return 1234"),
    ("x", "y"),
    ("naïve café, ", "Grüße 中文"),
    ("<s>in", " out"),
    ("long " * 70, "enough to be cut"),
    ("emoji", " \U0001f600!"),
    ("   ", "after blanks"),
]
LONG = " ".join(foreign.CORPUS[:5] + foreign.CORPUS[3::-1])
TEMPLATE = (
    "{% for m in messages %}<|user|>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|user|>assistant:{% endif %}"
)


def make_checkpoint(directory, kind, bos):
    """A random Llama of transformers with a tokenizer, saved."""
    backend = getattr(foreign, kind)()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in foreign.SPECIAL])
    if bos:
        foreign.begin_with_bos(backend)
    foreign.write(directory, backend, chat_template=TEMPLATE)
    torch.manual_seed(3)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=backend.get_vocab_size(),
            hidden_size=48,
            intermediate_size=88,
            num_hidden_layers=2,
            num_attention_heads=6,
            num_key_value_heads=2,
            max_position_embeddings=512,
            initializer_range=0.2,
            bos_token_id=backend.token_to_id("<s>"),
            eos_token_id=backend.token_to_id("</s>"),
            pad_token_id=None,
        )
    )
    if kind == "spaced":
        # Bytes that are no UTF-8 look different decoded by the package tokenizers: a whole run of them is lost. The
        # model writes none.
        rows = [backend.token_to_id(f"<0x{byte:02X}>") for byte in range(256)]
        model.lm_head.weight.data[rows] = 0
    model.eval().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module", params=["byte_level-bos", "byte_level-plain", "spaced-bos"])
def checkpoint(request, tmp_path_factory):
    kind, begin = request.param.split("-")
    return make_checkpoint(tmp_path_factory.mktemp(request.param), kind, begin == "bos")


def ours(checkpoint, **options):
    options = {"max_length": LENGTH, "batch_size": 4} | options
    return AdaptedLM(load_model(checkpoint), load_tokenizer(checkpoint), **options)


def theirs(checkpoint):
    model = LlamaForCausalLM.from_pretrained(checkpoint).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.pad_token = tokenizer.eos_token
    # Their cache of logits takes the first rows, not the last, where two continuations of one text differ in length.
    return HFLM(
        pretrained=model, tokenizer=tokenizer, max_length=LENGTH, batch_size=1, device="cpu", logits_cache=False
    )


def requests(kind, arguments, task="some_task"):
    return [
        Instance(request_type=kind, doc={}, arguments=tuple(args), idx=0, metadata=(task, index, 1))
        for index, args in enumerate(arguments)
    ]


def check_values(one, other):
    torch.testing.assert_close(torch.tensor(one), torch.tensor(other), rtol=0, atol=CLOSE)


def test_loglikelihoods_are_those_of_the_harness(checkpoint):
    """Blanks alone as a context are no case of theirs where texts have no begin token: they need a token before."""
    lm, reference = ours(checkpoint), theirs(checkpoint)
    pairs = [pair for pair in PAIRS if pair[0].strip() or not pair[0] or lm.tok_encode("")]
    asked = requests("loglikelihood", pairs)
    got, wanted = lm.loglikelihood(asked, disable_tqdm=True), reference.loglikelihood(asked, disable_tqdm=True)
    check_values([value for value, _ in got], [value for value, _ in wanted])
    assert [greedy for _, greedy in got] == [greedy for _, greedy in wanted]
    assert lm.truncated["some_task"] == 1
    assert len(lm.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)) == len(PAIRS)


def test_rolling_loglikelihoods_are_those_of_the_harness(checkpoint):
    lm, reference = ours(checkpoint), theirs(checkpoint)
    texts = [(text,) for text in [LONG, "short", LONG[:300], "a"]]
    assert len(lm.tok_encode(LONG)) > 2 * LENGTH
    asked = requests("loglikelihood_rolling", texts)
    got = lm.loglikelihood_rolling(asked, disable_tqdm=True)
    wanted = reference.loglikelihood_rolling(asked, disable_tqdm=True)
    # Their sums are of float32 values near 1000, a step of which is 6e-5.
    torch.testing.assert_close(torch.tensor(got), torch.tensor(wanted), rtol=2e-6, atol=CLOSE)


def test_texts_are_those_of_the_harness(checkpoint):
    """Greedily, with and without stop strings, and after a context that has to be cut."""
    lm, reference = ours(checkpoint), theirs(checkpoint)
    free = reference.generate_until(requests("generate_until", [("The quick", {"max_gen_toks": 12})]))[0]
    assert len(free) > 4
    arguments = [
        ("The quick", {"max_gen_toks": 12}),
        ("The quick", {"max_gen_toks": 12, "until": [free[3:5]]}),
        ("The quick", {"max_gen_toks": 12, "until": ["never there", free[2]], "do_sample": False}),
        ("def read(path):\n", {"max_gen_toks": 12}),
        ("long " * 70, {"max_gen_toks": 12, "temperature": 0.0}),
        ("naïve 中文", {"max_gen_toks": 7, "until": "zzz"}),
    ]
    asked = requests("generate_until", arguments)
    got = lm.generate_until(asked, disable_tqdm=True)
    assert got == reference.generate_until(asked, disable_tqdm=True)
    assert got[0].startswith(got[1])
    assert free[3:5] not in got[1]
    assert lm.truncated["some_task"] == 1


def test_a_greedy_continuation_is_called_greedy(checkpoint):
    """What the model writes is what it finds most likely, token by token."""
    lm = ours(checkpoint)
    context = "The quick brown"
    tokens = lm.tok_encode(context)
    with torch.no_grad():
        for _ in range(5):
            tokens.append(int(lm.model(torch.tensor([tokens]))[0, -1].argmax()))
    start = len(lm.tok_encode(context))
    for changed in (0, 1):
        after = [*tokens[start:-1], (tokens[-1] + changed) % lm.tokenizer.vocab_size]
        assert lm._loglikelihood_tokens([(None, tokens[:start], after)], disable_tqdm=True)[0][1] == (changed == 0)


@pytest.mark.parametrize("attention", ["rcmha", "linear"])
def test_batches_change_nothing(checkpoint, attention):
    """Nor does company: every variant sees right-padded rows as it sees them alone."""
    tokenizer = load_tokenizer(checkpoint)
    torch.manual_seed(1)
    config = DecoderConfig(
        vocab_size=tokenizer.vocab_size, model_dim=32, num_layers=2, attention=attention, init_std=0.2
    )
    model = DecoderLM(config).eval()
    pairs = requests("loglikelihood", PAIRS)
    texts = requests("loglikelihood_rolling", [(LONG,), ("short",), (LONG[:90],)])
    prompts = requests("generate_until", [(context or "a", {"max_gen_toks": 9}) for context, _ in PAIRS])
    found = []
    for size in (1, 3, 64):
        lm = AdaptedLM(model, tokenizer, max_length=LENGTH, batch_size=size)
        values = [value for value, _ in lm.loglikelihood(pairs, True)] + lm.loglikelihood_rolling(texts, True)
        found.append((values, lm.generate_until(prompts, True)))
    for values, written in found[1:]:
        torch.testing.assert_close(torch.tensor(values), torch.tensor(found[0][0]), rtol=1e-6, atol=CLOSE)
        assert written == found[0][1]


def test_truncation_keeps_the_end(checkpoint):
    """What is cut away on the left changes nothing; the last token that is kept does."""
    lm = ours(checkpoint, max_length=8)
    before, after = list(range(10, 40)), [5, 6, 7]
    kept = (before + after)[-9:]
    ask = lambda tokens: lm._loglikelihood_tokens([(None, tokens, after)], disable_tqdm=True)[0][0]  # noqa: E731
    with torch.no_grad():
        log_probabilities = lm.model(torch.tensor([kept[:-1]])).log_softmax(-1)[0, -3:]
    wanted = log_probabilities[range(3), after].sum().item()
    assert abs(ask(before) - wanted) < CLOSE
    assert abs(ask([99, *before[1:]]) - wanted) < CLOSE
    assert abs(ask([*before[:-6], 99, *before[-5:]]) - wanted) > CLOSE


def test_sampling_follows_its_seed(checkpoint):
    options = {"do_sample": True, "temperature": 1.5, "top_k": 40, "top_p": 0.9, "max_gen_toks": 10}
    asked = requests("generate_until", [("The quick", options)] * 3)
    first, again, other = (ours(checkpoint, seed=seed).generate_until(asked, True) for seed in (1, 1, 2))
    assert first == again != other
    assert len(set(first)) > 1


def test_chat(checkpoint):
    """The text of transformers, also where the last message is to be continued; the begin token comes once."""
    lm, reference = ours(checkpoint, chat=True), theirs(checkpoint)
    messages = [{"role": "user", "content": "Hello, you"}, {"role": "assistant", "content": "The answer is"}]
    for prompt in (True, False):
        assert lm.apply_chat_template(messages, prompt) == reference.apply_chat_template(messages, prompt)
    assert lm.tok_encode("<s>Hello").count(lm.prefix_token_id) == 1
    assert lm.tok_encode("<s>Hello") == reference.tok_encode("<s>Hello")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_beams": 4}, "'num_beams' is not supported; known: do_sample, max_gen_toks"),
        ({"max_length": 40}, "'max_length' is not supported"),
        ({"do_sample": True}, "do_sample=true needs a temperature above 0"),
        ({"do_sample": True, "temperature": float("nan")}, "generation_kwargs: temperature=nan"),
        ({"top_p": 0.0}, "generation_kwargs: top_p=0.0"),
        ({"max_gen_toks": LENGTH}, "max_gen_toks=47 must be at least 1 and leave room"),
        ({"until": [3]}, "must be texts"),
    ],
)
def test_generation_that_is_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Generation.parse(kwargs, LENGTH)


def test_generation_defaults_fit_the_model():
    assert Generation.parse({}, 64).max_tokens == 32
    assert Generation.parse({}, 4096).max_tokens == 256
    assert Generation.parse({"max_new_tokens": 5, "temperature": 0.5}, 64) == Generation(
        until=(), max_tokens=5, temperature=0.5, top_p=1.0, top_k=0
    )


def test_refused(checkpoint):
    lm = ours(checkpoint)
    with pytest.raises(ValueError, match="task 'some_task': the continuation \"\" adds no token to its context"):
        lm.loglikelihood(requests("loglikelihood", [("a", "")]))
    with pytest.raises(ValueError, match=r"has \d+ tokens, more than the model's context of 47"):
        lm.loglikelihood(requests("loglikelihood", [("a", " b" * 99)]))
    with pytest.raises(ValueError, match="max_length=513 must be at least 2 and at most the model's 512"):
        ours(checkpoint, max_length=513)
    with pytest.raises(ValueError, match="batch_size=0"):
        ours(checkpoint, batch_size=0)
    with pytest.raises(ValueError, match="use --chat"):
        lm.apply_chat_template([{"role": "user", "content": "hello"}])


def command(*arguments, cache, code=None):
    """The script in a process of its own, with a cache of its own."""
    cache.mkdir(exist_ok=True)
    out, errors, script = (cache / name for name in ("out", "errors", "script.py"))
    script.write_text(code or "import sys\nfrom scripts.eval_lm import main\nsys.exit(main())")
    words = [str(script), *map(str, arguments)]
    process = start_script(words, environment(HF_HOME=str(cache), GIT_DIR=str(cache / "none")), out, errors, cwd=ROOT)
    process.join(300)
    return subprocess.CompletedProcess(words, process.exitcode, out.read_text(), errors.read_text())


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """One of our own: RCMHA, 128 positions, and a tokenizer of another's make."""
    directory = make_checkpoint(tmp_path_factory.mktemp("export"), "byte_level", True)
    tokenizer = load_tokenizer(directory)
    torch.manual_seed(0)
    config = DecoderConfig(vocab_size=tokenizer.vocab_size, model_dim=32, num_layers=2, max_positions=128)
    return save_model(directory / "own", DecoderLM(config), tokenizer=tokenizer)


def test_the_command_writes_a_report(export, tmp_path):
    done = command(export, "--tasks", TASKS, "--json", tmp_path / "eval.json", "--dtype", "bfloat16", cache=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "attnzoo_choice" in done.stdout
    assert "request/s" in done.stderr
    assert "fatal" not in done.stderr, "git is asked for a commit where there is none"
    report = json.loads((tmp_path / "eval.json").read_text(encoding="utf-8"))
    rows = {(row["task"], row["metric"]): row for row in report["rows"]}
    assert rows.keys() >= {
        ("attnzoo_choice", "acc"),
        ("attnzoo_choice", "acc_norm"),
        ("attnzoo_prose", "bits_per_byte"),
        ("attnzoo_sums", "exact_match"),
    }
    assert rows["attnzoo_choice", "acc"]["items"] == 12
    # A model that has learned nothing: its tokens are equally likely, some 700 of them, of a byte or a few each.
    assert 2 < rows["attnzoo_prose", "bits_per_byte"]["value"] < 10
    assert rows["attnzoo_sums", "exact_match"]["value"] == 0
    assert report["versions"]["lm_eval"].startswith("0.4.")
    assert report["command"][:2] == ["attnzoo", "eval"]
    assert report["claims"] == []
    assert not report["quick"]


def test_the_command_on_one_file_in_a_chat(export, tmp_path):
    done = command(
        export, "--tasks", TASKS / "choice.yaml", "--quick", "--chat", "--max-length", 20, "--json",
        tmp_path / "eval.json", cache=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "eval.json").read_text(encoding="utf-8"))
    assert {(row["task"], row["items"]) for row in report["rows"]} == {("attnzoo_choice", 4)}
    assert all(row["truncated"] == 16 for row in report["rows"]), "the chat's context does not fit 20 tokens"
    assert report["quick"]


def test_groups_and_lists_of_tasks(export, tmp_path):
    """A group is a row of its own; its tasks come once."""
    for path in TASKS.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    group = {
        "group": "attnzoo_two",
        "task": ["attnzoo_choice", "attnzoo_sums"],
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
    }
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(group), encoding="utf-8")
    done = command(export, "--tasks", tmp_path, "--limit", 2, "--json", tmp_path / "eval.json", cache=tmp_path / "hf")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "eval.json").read_text(encoding="utf-8"))["rows"]
    keys = [(row["task"], row["metric"]) for row in rows]
    assert len(keys) == len(set(keys)) == 6 + 1
    assert ("attnzoo_two", "acc") in keys


def test_wrong_usage(export, tmp_path):
    """Each ends with status 2 and says on stderr what is wrong; nothing is measured before."""
    (tmp_path / "empty").mkdir()
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "task.yaml").write_text("task: [unclosed", encoding="utf-8")
    gone = tmp_path / "gone"
    gone.mkdir()
    (gone / "task.yaml").write_text((TASKS / "sums.yaml").read_text("utf-8"), encoding="utf-8")
    lost = tmp_path / "lost"
    lost.mkdir()
    (lost / "task.yaml").write_text("include: nowhere.yaml\ntask: lost", encoding="utf-8")
    cases = [
        ([export], "the following arguments are required: --tasks"),
        ([export, "--tasks", tmp_path / "nowhere"], "is neither a directory nor a .yaml file"),
        ([export, "--tasks", tmp_path / "empty"], "holds no task"),
        ([export, "--tasks", broken], "is not YAML"),
        ([export, "--tasks", lost], "lm-eval does not find 'lost'"),
        ([export, "--tasks", gone], "task 'attnzoo_sums'"),
        ([tmp_path / "none", "--tasks", TASKS], "does not exist"),
        ([export, "--tasks", TASKS, "--limit", "0"], "--limit=0 must be at least 1"),
        ([export, "--tasks", TASKS, "--num-fewshot", "-1"], "--num-fewshot=-1 must be at least 0"),
        (
            [export, "--tasks", TASKS, "--json", broken / "task.yaml" / "eval.json"],
            "task.yaml' is a file, not a directory",
        ),
        ([export, "--tasks", TASKS, "--dtype", "bfloat17"], "unknown dtype 'bfloat17'"),
        ([export, "--tasks", TASKS, "--device", "nowhere"], "--device: 'nowhere' cannot be used"),
        ([export, "--tasks", TASKS, "--max-length", "4096"], "at most the model's 128 positions"),
    ]
    # All in one process: most of the time is spent on imports.
    code = (
        "import contextlib, io, json, sys\nfrom scripts.eval_lm import main\n"
        "for arguments in json.loads(sys.argv[1]):\n"
        "    sys.argv, errors = ['eval_lm', *arguments], io.StringIO()\n"
        "    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):\n"
        "        try:\n            status = main()\n"
        "        except SystemExit as error:\n            status = error.code\n"
        "    print(json.dumps([status, errors.getvalue()]))\n"
    )
    everything = json.dumps([[str(argument) for argument in arguments] for arguments, _ in cases])
    done = command(everything, cache=tmp_path / "hf", code=code)
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    for (arguments, message), (status, errors) in zip(cases, answers, strict=True):
        assert status == 2, (arguments, errors)
        assert message in errors, (arguments, errors)


def test_a_missing_package_is_named(export, tmp_path):
    code = "import sys; sys.modules['lm_eval'] = None\nfrom scripts.eval_lm import main; sys.exit(main())"
    done = command(export, "--tasks", TASKS, cache=tmp_path, code=code)
    assert done.returncode == 2
    assert "pip install 'attnzoo[eval]'" in done.stderr


def test_help_shows_examples(tmp_path):
    done = command("--help", cache=tmp_path)
    assert done.returncode == 0
    assert "smollm2 --tasks tests/data/eval" in done.stdout
