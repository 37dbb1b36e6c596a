"""The second loss of pictures: what is in each patch."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from attnzoo.models import MultimodalLM, PictureEncoder
from attnzoo.vision import SceneOptions, SceneWorld
from attnzoo.vision.trained_pictures import load_pictures
from tests.helpers import serving
from tests.helpers.emoji_fonts import needs
from tests.helpers.picture_task import OWN, prepared, words
from train.config_reader import load_config
from train.tasks.patch_head import WithPatchHead

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


@pytest.mark.parametrize("frozen", [False, True])
def test_the_loss_is_that_of_answers_and_of_patches(tmp_path: Path, frozen: bool) -> None:
    """However a batch is cut. The head is trained by neither Muon nor kept in the export. Kills: no weight; patches of
    another picture; the head in the export."""
    torch.manual_seed(0)
    own = OWN
    if frozen:
        language_model = serving.export(tmp_path / "lm", "mha", max_len=96)
        own = [f"model.language_model={language_model}", "model.projector={hidden: 20, grid: 2}", "model.dtype=float32"]
    config = "vlm-smollm2.yaml" if frozen else "vlm-small.yaml"
    task = prepared(tmp_path / "cache", *own, "task.patch_loss=0.5", "train.batch_size=4", config=config)
    model = task.model()
    assert isinstance(model, WithPatchHead)
    trained = model.trained
    assert isinstance(trained, PictureEncoder if frozen else MultimodalLM)
    batch = task.train.next(4, 0, 1)
    count = torch.tensor(float(task.count(batch)))
    loss = task.loss(model, batch, count)
    with torch.no_grad():
        logits, targets = task.whole(model).target_logits(batch[1], batch[2], batch[0])
        patches = model.head(model.encoder.vision(batch[0]))
        expected = F.cross_entropy(logits, targets) + 0.5 * F.cross_entropy(patches.flatten(0, 1), batch[4].flatten())
    torch.testing.assert_close(loss.detach(), expected)
    halves = [task.loss(model, tuple(t[i : i + 2] for t in batch), count) for i in (0, 2)]
    torch.testing.assert_close(sum(halves).detach(), expected)
    loss.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.head.parameters())
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
    assert torch.equal(again.head.weight, model.head.weight)


def test_a_weight_below_0_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"task\.patch_loss=-1\.0 must be a number of at least 0"):
        load_config("vlm-small.yaml", words(tmp_path, *OWN, "task.patch_loss=-1"))
