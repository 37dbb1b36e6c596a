"""What else is learned from pictures: what is in each patch, and where the things are that words name."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from attnzoo.models import MultimodalLM, PictureEncoder
from attnzoo.vision import SceneOptions, SceneQuestion, SceneWorld
from attnzoo.vision.trained_pictures import load_pictures
from tests.helpers import serving
from tests.helpers.emoji_fonts import needs
from tests.helpers.picture_task import OWN, prepared, words
from train.config_reader import load_config
from train.tasks.scene_heads import WithSceneHeads

pytestmark = needs("openmoji")


def test_a_patch_has_the_kind_of_what_covers_its_middle() -> None:
    """Counted pixel by pixel. Kills: rows for columns; the object behind another one."""
    world = SceneWorld(SceneOptions(held_out_font=None))
    objects = 0
    for index in range(40):
        scene = world.scene("train", 3, index)
        found = world.patch_kinds(scene, 8)
        assert found.shape == (64,)
        for patch, kind in enumerate(found.tolist()):
            y, x = (8 * at + 4 for at in divmod(patch, 8))
            over = [o.kind for o in scene.objects if max(abs(o.x - x), abs(o.y - y)) <= o.size / 2]
            assert kind == (over[-1] if over else 16)
            objects += bool(over)
    assert objects > 200


def test_words_are_marked_where_they_end(tmp_path: Path) -> None:
    """Singular and plural, of questions and answers, whatever their tokens; up to the last question that fits. Kills:
    places counted without what stands between turns; words inside other words."""
    texts = "task.texts={before: 'look: ', ask: '{question} ', reply: '{answer}.', between: ' and '}"
    task = prepared(tmp_path, *OWN, texts, "task.turns=5", "task.text_share=0.5")
    tokenizer = task.tokenizer
    assert tokenizer is not None
    _, tokens_BT, _, _, _, named_BT = task.train.next(24, 0, 1)
    plurals = {kind: word for word, kind in task.world.words.items()}  # the plural is the later one
    found = 0
    for tokens, named in zip(tokens_BT, named_BT, strict=True):
        begin = len(task.reader.begin)
        assert bool((named[:begin] == -1).all())
        told = tokenizer.decode(tokens[begin:].tolist())
        words = re.findall("|".join(rf"\b{word}\b" for word in task.world.words), told)
        marked = [(at, kind) for at, kind in enumerate(named.tolist()) if kind >= 0]
        assert [task.world.words[word] for word in words] == [kind for _, kind in marked]
        for at, kind in marked:
            text = tokenizer.decode(tokens[begin : at + 1].tolist())
            assert text.endswith((task.world.names[kind], plurals[kind]))
        found += len(marked)
    assert found > 100


@pytest.mark.parametrize("frozen", [False, True])
def test_the_loss_is_that_of_answers_patches_and_words(tmp_path: Path, frozen: bool) -> None:
    """However a batch is cut. Heads are trained by no Muon and kept in no export. Kills: no weight; patches of another
    picture; another layer; words or pictures that count for more than others; a head in the export."""
    torch.manual_seed(0)
    own = [*OWN, "task.word_loss=0.25"]
    if frozen:
        language_model = serving.export(tmp_path / "lm", "mha", max_len=96)
        own = [f"model.language_model={language_model}", "model.projector={hidden: 20, grid: 2}", "model.dtype=float32"]
    config = "vlm-smollm2.yaml" if frozen else "vlm-small.yaml"
    task = prepared(tmp_path / "cache", *own, "task.patch_loss=0.5", "train.batch_size=4", config=config)
    model = task.model()
    assert isinstance(model, WithSceneHeads)
    assert model.patch_head is not None
    trained = model.trained
    assert isinstance(trained, PictureEncoder if frozen else MultimodalLM)
    batch = task.train.next(4, 0, 1)
    count = torch.tensor(float(task.count(batch)))
    loss = task.loss(model, batch, count)
    with torch.no_grad():
        whole = task.whole(model)
        logits, targets = whole.target_logits(batch[1], batch[2], batch[0])
        patches = model.patch_head(model.encoder.vision(batch[0]))
        expected = F.cross_entropy(logits, targets) + 0.5 * F.cross_entropy(patches.flatten(0, 1), batch[4].flatten())
        assert (model.word_head is None) == frozen
        if model.word_head is not None:
            x = whole.decoder.layers()[0](whole.embed(batch[1], batch[0]))
            each = []
            for row, named in enumerate(batch[5].tolist()):
                words = [(at, kind) for at, kind in enumerate(named) if kind >= 0]
                for at, kind in words:
                    vector = x[row, at] / x[row, at].square().mean().add(torch.finfo(x.dtype).eps).sqrt()
                    chances = model.word_head(vector).sigmoid()
                    there = batch[4][row] == kind
                    each.append(-torch.where(there, chances, 1 - chances).log().sum() / len(words))
            expected += 0.25 * sum(each) / 4
    torch.testing.assert_close(loss.detach(), expected)
    halves = [task.loss(model, tuple(t[i : i + 2] for t in batch), count) for i in (0, 2)]
    torch.testing.assert_close(sum(halves).detach(), expected)
    loss.backward()
    heads = [head for head in (model.patch_head, model.word_head) if head is not None]
    assert all(p.grad is not None and bool(p.grad.any()) for head in heads for p in head.parameters())
    named = dict(model.named_parameters())
    matrices = model.matrix_parameters()
    assert all(named[name] is weight for name, weight in matrices)
    assert "trained.output.weight" in dict(matrices) if frozen else "trained.pictures.output.weight" in dict(matrices)
    assert all(name.startswith("trained.") for name, _ in matrices)
    task.save(tmp_path / "export", model, {})
    found = load_pictures(tmp_path / "export").pictures.state_dict()
    kept = model.encoder.state_dict()
    assert found.keys() == kept.keys()
    assert all(torch.equal(found[name], weight) for name, weight in kept.items())
    again = task.rebuilt(model, model.state_dict())
    assert again.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(again.patch_head.weight, model.patch_head.weight)


@pytest.mark.parametrize("frozen", [False, True])
def test_vectors_learn_the_names_of_what_they_show(tmp_path: Path, frozen: bool) -> None:
    """Vector by vector: what most of its patches show, by the angle to what tells a name from the others, whatever the
    vector's size. Kills: patches of another place; a thing that half of a vector's patches show taken for none; sizes
    that count; a mean over words that all names share."""
    torch.manual_seed(0)
    own = [*OWN, "model.projector={hidden: 20, grid: 2, output: small}"]
    if frozen:
        language_model = serving.export(tmp_path / "lm", "mha", max_len=96)
        own = [f"model.language_model={language_model}", "model.projector={hidden: 20, grid: 2}", "model.dtype=float32"]
    config = "vlm-smollm2.yaml" if frozen else "vlm-small.yaml"
    task = prepared(tmp_path / "cache", *own, "task.name_loss=0.5", "train.batch_size=4", config=config)
    model = task.model()
    assert isinstance(model, WithSceneHeads)
    assert model.patch_head is None
    batch = task.train.next(4, 0, 1)
    count = torch.tensor(float(task.count(batch)))
    loss = task.loss(model, batch, count)
    tokenizer, kinds = task.tokenizer, len(task.world.names)
    assert tokenizer is not None
    spelled = [tokenizer.decode(name).strip() for name in model.names]
    assert spelled == list(task.world.names)
    seen = set()
    with torch.no_grad():
        whole = task.whole(model)
        logits, targets = whole.target_logits(batch[1], batch[2], batch[0])
        embeddings = whole.decoder.embed(torch.arange(tokenizer.vocab_size)[None])[0]
        words = torch.stack([embeddings[torch.tensor(name)].mean(0) for name in model.names])
        each = []
        for row, image in enumerate(batch[0]):
            vectors = model.encoder(image[None])[0]
            for number, vector in enumerate(vectors):
                top, left = divmod(number, 2)
                patches = batch[4][row].view(4, 4)[2 * top : 2 * top + 2, 2 * left : 2 * left + 2].flatten()
                shown = [int((patches == kind).sum()) for kind in range(kinds)]
                most = max(range(kinds), key=shown.__getitem__)
                target = most if shown[most] >= 2 else kinds  # one of four patches is less than a third
                seen.add((target == kinds, shown[most]))
                cosines = F.cosine_similarity(vector[None], words - words.mean(0))
                logit = 20 * torch.cat([cosines, torch.tensor([0.3])])
                each.append(-logit.log_softmax(0)[target])
        expected = F.cross_entropy(logits, targets) + 0.5 * sum(each) / len(each)
    assert {(True, 0), (True, 1), (False, 2)} <= seen
    torch.testing.assert_close(loss.detach(), expected)
    halves = [task.loss(model, tuple(t[i : i + 2] for t in batch), count) for i in (0, 2)]
    torch.testing.assert_close(sum(halves).detach(), expected)


@pytest.mark.parametrize("name", ["patch_loss", "word_loss", "name_loss"])
def test_a_weight_below_0_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=rf"task\.{name}=-1\.0 must be a number of at least 0"):
        load_config("vlm-small.yaml", words(tmp_path, *OWN, f"task.{name}=-1"))


def test_a_question_that_does_not_fit_is_named(tmp_path: Path) -> None:
    """Later ones are left out."""
    task = prepared(tmp_path, *OWN)
    short, long = (SceneQuestion("text", text, "yes") for text in ("is it?", "is it so? " * 40))
    reader = task.reader
    assert reader.sequence([short, long]) == reader.sequence([short])
    with pytest.raises(ValueError, match=r"^the picture with the question 'is it so\?.*takes \d+ tokens, and 96 fit$"):
        reader.sequence([long, short])


def test_a_frozen_language_model_learns_no_words(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"task\.word_loss=0\.1 .*model\.language_model"):
        load_config("vlm-smollm2.yaml", ["task.word_loss=0.1", "lora.rank=null", f"cache_dir={tmp_path}"])


def test_adapters_are_in_the_language_model_alone(tmp_path: Path) -> None:
    """Tower, projector and heads train, and of the language model its adapters. Kills: adapters in the tower,
    which freeze it."""
    lm = serving.export(tmp_path / "lm", "mha", max_len=96)
    own = [f"model.language_model={lm}", "model.projector={hidden: 20, grid: 2}", "model.dtype=float32"]
    lora = ["lora={rank: 3, targets: [query, output]}", "task.patch_loss=0.5", "task.word_loss=0.1"]
    task = prepared(tmp_path / "cache", *own, *lora, config="vlm-smollm2.yaml")
    model = task.model()
    task.add_adapters(model)
    trains = {name for name, weight in model.named_parameters() if weight.requires_grad}
    names = {name for name, _ in model.named_parameters()}
    inside = {name for name in names if name.startswith("trained.decoder.")}
    assert trains - inside == names - inside
    assert not any("lora" in name for name in names - inside)
    assert trains & inside == {name for name in inside if ".lora_" in name} != set()


@pytest.mark.parametrize(
    ("config", "given", "said"),
    [
        (
            "vlm-smollm2.yaml",
            ["model.dtype=bfloat16"],
            r"lora\.rank=8 with model\.dtype=bfloat16.*model\.dtype=float32",
        ),
        ("vlm-small.yaml", ["lora.rank=4", "optim.name=adamw"], r"lora\.rank=4 adapts model\.language_model"),
    ],
)
def test_adapters_without_a_language_model_to_adapt_are_refused(
    tmp_path: Path, config: str, given: list[str], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        load_config(config, [*given, f"cache_dir={tmp_path}"])
