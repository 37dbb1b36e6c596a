"""Language models that look at pictures, as a task: batches, losses, metrics beside baselines, the export."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from attnzoo.checkpoint.frozen import FrozenLM
from attnzoo.models import MultimodalLM, PictureEncoder, generate
from attnzoo.vision.questions import KINDS, SceneQuestion
from attnzoo.vision.trained_pictures import check_target, load_pictures, save_pictures
from attnzoo.vision.turns import TurnFormat, Turns, padded
from tests.helpers import serving
from tests.helpers.emoji_fonts import needs
from tests.helpers.picture_task import OWN, prepared, words
from train.config_reader import load_config
from train.data import IGNORED
from train.main import main
from train.tasks import PictureTask

pytestmark = needs("openmoji")


LOOKING = len(KINDS) - 1
"""Kinds of questions that need the picture: all but those about words."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def task(cache: Path) -> PictureTask:
    return prepared(cache, *OWN)


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return serving.export(tmp_path_factory.mktemp("lm"), "rcmha", max_len=96)


def frozen_task(cache: Path, language_model: Path, *overrides: str) -> PictureTask:
    own = [
        "model.projector={hidden: 20, grid: 2}",
        "task.questions=2",
        "task.texts={before: See}",
        "model.dtype=float32",
    ]
    return prepared(cache, f"model.language_model={language_model}", *own, *overrides, config="vlm-smollm2.yaml")


def test_turns_count_answers_alone_and_drop_what_does_not_fit() -> None:
    tokenizer = serving.tokenizer()
    questions = [SceneQuestion("count", "how many?", "two"), SceneQuestion("side", "left or right?", "left")]
    texts = TurnFormat(before="See: ", ask="{question}=", reply="{answer};", between=" ")
    turns = Turns(tokenizer, texts, image_token=999, places=3)
    tokens, targets = turns.sequence(questions)
    begin = [*tokenizer.encode("See: ", bos=True), 999, 999, 999]
    parts = [begin, tokenizer.encode("how many?="), tokenizer.encode("two;"), tokenizer.encode(" "),
             tokenizer.encode("left or right?="), tokenizer.encode("left;")]  # fmt: skip
    whole = [token for part in parts for token in part]
    assert tokens == whole[:-1]
    told = [t for t in targets if t != IGNORED]
    assert told == [*parts[2], *parts[5]]
    first = sum(map(len, parts[:2])) - 1
    assert targets[first : first + len(parts[2])] == parts[2]
    assert all(t in (IGNORED, following) for t, following in zip(targets, whole[1:], strict=True))
    assert turns.words(questions) == [token for token in whole if token != 999]
    short = Turns(tokenizer, texts, image_token=999, places=3, longest=len(whole) - 1)
    assert short.sequence(questions) == turns.sequence(questions[:1])
    tokens_BT, targets_BT = padded([turns.sequence(questions), turns.sequence(questions[:1])])
    assert tokens_BT.shape == targets_BT.shape == (2, len(whole) - 1)
    assert (targets_BT[1, len(short.sequence(questions)[0]) :] == IGNORED).all()
    with pytest.raises(ValueError, match=r"a picture and one question take .* tokens or more, and 12 fit"):
        Turns(tokenizer, texts, image_token=999, places=9, longest=12)
    with pytest.raises(ValueError, match=r"ask='Q:' must hold \{question\} once"):
        TurnFormat(ask="Q:")


def test_batches_are_the_same_however_ranks_share_them(task: PictureTask) -> None:
    task.train.load({"used": 0})
    one, two = task.train.next(4, 0, 1), task.train.next(4, 0, 1)
    for rank in (0, 1):
        task.train.load({"used": 4})
        half = task.train.next(2, rank, 2)
        assert torch.equal(half[0], two[0][2 * rank : 2 * rank + 2])
        longest = half[1].shape[1]
        assert torch.equal(half[2], two[2][2 * rank : 2 * rank + 2, :longest])
    assert not torch.equal(one[0], two[0])
    assert task.train.state() == {"used": 8}
    images, tokens, targets, groups, kinds, named = one
    assert images.dtype == torch.uint8
    assert images.shape == (4, 3, 32, 32)
    assert ((tokens == task.reader.begin[-1]).sum(1) == 16).all()
    assert (groups == -1).all()
    assert kinds.shape == (4, 16)
    assert named.shape == tokens.shape
    assert (targets != IGNORED).sum(1).min() >= 3 * 2  # three answers and their ends


def test_a_loss_is_the_same_however_rows_are_cut_and_metrics_know_their_groups(task: PictureTask) -> None:
    torch.manual_seed(0)
    model, batch = task.model().eval(), task.validation()
    assert isinstance(model, MultimodalLM)
    assert len(batch[0]) == 4 * len(task.groups) == 4 * (3 * LOOKING + 1)
    some = tuple(t[::7] for t in batch)
    count = torch.tensor(float(task.count(some)))
    whole = task.loss(model, some, count)
    parts = [task.loss(model, tuple(t[i : i + 2] for t in some), count) for i in range(0, len(some[0]), 2)]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-4, atol=0)
    with torch.no_grad():
        measured = task.measure(model, some)
    assert task.metrics(some, measured)["loss"] == pytest.approx(float(whole.detach()), rel=1e-5)
    # All right but the questions of one kind, on pictures as in training.
    right = torch.ones(len(batch[0]), 2)
    wrong = task.groups.index(("standard", "side"))
    right[batch[3] == wrong, 1] = 0.0
    found = task.metrics(batch, right)
    assert found.keys() == {*task.METRICS, "pairs", "positions"}
    assert (found["side"], found["count"], found["pairs"]) == (0.0, 1.0, 1.0)
    assert found["accuracy"] == task.score(found) == pytest.approx((LOOKING - 1) / LOOKING)
    assert all(np.isnan(value) for value in task.metrics(batch, right * float("nan")).values())
    few = task.validation(len(task.groups) + 1)
    assert len(few[0]) == len(task.groups) + 1
    assert len(few[3].unique()) == len(task.groups)
    baselines = task.baselines
    assert baselines.keys() == KINDS.keys()
    assert found["blind"] == pytest.approx(np.mean([v["blind"] for k, v in baselines.items() if k != "text"]))
    assert task.summary()["data"]["baselines"] == baselines


def test_a_right_answer_needs_all_its_tokens(task: PictureTask) -> None:
    """Measured by a model that says what it is told, but for one token of one row."""
    batch = tuple(t[:3] for t in task.validation())
    targets = batch[2][batch[2] != IGNORED]

    class Says(MultimodalLM):
        def __init__(self) -> None:
            torch.nn.Module.__init__(self)

        def target_logits(self, tokens_BT, targets_BT, images=None):
            said = targets.clone()
            said[-1] = 0
            return 9.0 * torch.nn.functional.one_hot(said, 300), targets

    assert task.measure(Says(), batch)[:, 1].tolist() == [1.0, 1.0, 0.0]


def test_an_export_answers_as_the_model_did(task: PictureTask, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = task.model().eval()
    task.save(tmp_path / "export", model, {"steps": 3})
    trained = load_pictures(tmp_path)
    assert (trained.own, trained.metadata, trained.data["kinds"]) == (True, {"steps": 3}, 6)
    scene, question = task.evaluated[task.groups.index(("standard", "colour"))]
    image, answers = task.world.image(scene), ["red", "green", question.answer]
    found = trained.log_likelihoods(image[None], question.text, answers)
    row = task.groups.index(("standard", "colour"))
    batch = tuple(t[row : row + 1] for t in task.validation())
    with torch.no_grad():
        loss = float(task.measure(model, batch)[0, 0])
    np.testing.assert_allclose(found[0, 2], -loss, rtol=1e-5)
    assert len({*found[0].tolist()}) == len(set(answers))
    # Generation from vectors in the prompt is the greedy text of whole passes over placeholders.
    prompt, tokens = trained.prompt(image, question.text), task.reader.prompt(question.text)
    assert prompt.spans == {"image": [(1, 17)]}
    images = batch[0]
    for _ in range(4):
        with torch.no_grad():
            tokens.append(int(trained.model(torch.tensor([tokens]), images)[0, -1].argmax()))
    generated = generate(trained.language_model.model, [prompt], max_new_tokens=4)
    assert generated == [tokens[-4:]]
    ended = task.tokenizer.encode("\n")[0]
    until = tokens[-4:].index(ended) if ended in tokens[-4:] else 4
    text = task.tokenizer.decode(tokens[-4:][:until])
    assert trained.answers(image[None], question.text, 4) == [text.removeprefix(" ")]
    assert sorted(path.name for path in (tmp_path / "export").iterdir()) == [
        "config.json", "model.safetensors", "pictures.json", "pictures.safetensors", "tokenizer.model",
    ]  # fmt: skip
    check_target(tmp_path / "export")
    config = json.loads((tmp_path / "export" / "pictures.json").read_text())
    for changed, message in (
        ({**config, "format": "other"}, "format 'other' is not 'attnzoo-pictures-1'"),
        ({**config, "picturs": 1}, "unknown key picturs"),
        ({**config, "pictures": {**config["pictures"], "width": 25}}, r"is damaged .*size mismatch"),
        ({**config, "turns": {"ask": "x"}}, r"is damaged .*must hold \{question\} once"),
    ):
        (tmp_path / "export" / "pictures.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=message):
            load_pictures(tmp_path)
    (tmp_path / "export" / "pictures.json").write_text(json.dumps(config))
    (tmp_path / "export" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds 'notes\.txt' beside the model"):
        save_pictures(tmp_path / "export", trained)
    with pytest.raises(ValueError, match="holds no trained model of format"):
        load_pictures(tmp_path / "nothing")


def test_in_front_of_a_frozen_language_model_only_pictures_train(
    cache: Path, language_model: Path, task: PictureTask, tmp_path: Path
) -> None:
    task.save(tmp_path / "own", task.model(), {})
    other = frozen_task(cache, language_model, f"checkpoint.init_from={tmp_path / 'own'}")
    torch.manual_seed(0)
    model, batch = other.model(), tuple(t[:4] for t in other.validation())
    assert isinstance(model, PictureEncoder)
    assert model.config.tokens == 4
    tower = load_pictures(tmp_path / "own").pictures.vision.state_dict()  # taken from the export, the projector is new
    assert all(torch.equal(value, tower[name]) for name, value in model.vision.state_dict().items())
    before = {name: p.clone() for name, p in other.language_model.model.named_parameters()}
    other.loss(model, batch, torch.tensor(1.0)).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    assert all(p.grad is None for p in other.language_model.model.parameters())
    assert all(torch.equal(p, before[name]) for name, p in other.language_model.model.named_parameters())
    vectors = model(batch[0])
    unit = other.language_model.model.embedding.weight.square().mean().sqrt()
    torch.testing.assert_close(vectors.square().mean(-1).sqrt(), unit.expand(4, 4), rtol=1e-2, atol=0)

    other.save(tmp_path / "export", model.eval(), {"steps": 2})
    trained = load_pictures(tmp_path / "export")
    assert sorted(path.name for path in (tmp_path / "export").iterdir()) == ["pictures.json", "pictures.safetensors"]
    _scene, question = other.evaluated[0]
    found = trained.log_likelihoods(other.world.image(other.evaluated[0][0])[None], question.text, [question.answer])
    with torch.no_grad():
        loss = float(other.measure(model, tuple(t[:1] for t in batch))[0, 0])
    np.testing.assert_allclose(found[0, 0], -loss, rtol=1e-5)
    frozen = FrozenLM.load(str(language_model))
    frozen.model.blocks[1].mlp.down.weight.data[3, 4] += 1e-3
    with pytest.raises(ValueError, match=r"trained with another language model than .* in float32 \(their digests"):
        load_pictures(tmp_path / "export", frozen)
    assert other.content()["language model (content)"] == trained.language_model.digest
    with pytest.raises(ValueError, match=r"has another tower: set model.vision"):
        frozen_task(
            cache,
            language_model,
            f"checkpoint.init_from={tmp_path / 'own'}",
            "model.vision={image_size: 32, patch_size: 4}",
        )
    with pytest.raises(ValueError, match="has another projector or decoder"):
        prepared(cache, *OWN, f"checkpoint.init_from={tmp_path / 'own'}", "model.projector={hidden: 7}")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.source=scene"], "data.source='scene'; did you mean 'scenes'"),
        (["data.image_size=40"], "data.image_size=40 differs from model.vision.image_size=32"),
        (["data.knds=5"], "unknown key data.knds; did you mean 'kinds'"),
        (["task.turns=0"], "task.turns=0 must be at least 1"),
        (["task.text_share=1.0"], "task.text_share=1.0 must be at least 0 and below 1"),
        (["task.texts={aks: x}"], "unknown key task.texts.aks; did you mean 'ask'"),
        (["model.decoder=null"], "give one of model.decoder .* and model.language_model"),
        (["model.language_model=smollm2"], "give one of model.decoder .* and model.language_model"),
        (["model.decoder={model_dim: twelve}"], "model.decoder.model_dim"),
        (["model.decoder={vocab_size: 5}"], "model.decoder.vocab_size: the tokenizer"),
        (["model.projector={hiden: 5}"], "unknown key model.projector.hiden; did you mean 'hidden'"),
        (["tokenizer.vocab_size=20"], "tokenizer.vocab_size=20 must be between"),
        (["sample.every=5"], "task.kind=pictures has no use for sample="),
    ],
)
def test_wrong_options_are_refused_by_name_before_anything_is_read(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config("vlm-small.yaml", words(Path("cache"), *OWN, *overrides))


def test_what_is_missing_is_refused_before_anything_is_prepared(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for overrides, message in (
        (["data.font=lost.ttf"], "data.font='lost.ttf' is no file"),
        (["data.held_out_font=lost.ttf"], "data.held_out_font='lost.ttf' is no file"),
        (["checkpoint.init_from=nowhere"], "checkpoint.init_from=nowhere: nowhere holds no trained model of format"),
        (["tokenizer.path=nowhere.model"], "nowhere.model"),
    ):
        given = words(tmp_path / "cache", *OWN, f"run_dir={tmp_path / 'run'}", *overrides)
        assert main(["--config", "vlm-small.yaml", "--dry-run", *given]) == 2
        assert message in capfd.readouterr().err
    assert not list(tmp_path.iterdir())
