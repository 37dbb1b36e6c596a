"""The task of pictures at sizes for tests."""

from pathlib import Path

from train.config_reader import load_config
from train.tasks import PictureTask, build_task

SCENES = ["image_size=32", "kinds=6", "smallest=8", "largest=12", "held_out_font=null"]
TOWER = "{image_size: 32, patch_size: 8, model_dim: 16, num_layers: 1, attention: {num_heads: 2}}"
DECODER = (
    "{model_dim: 24, num_layers: 2, attention: {kind: mha, num_heads: 2}, max_positions: 96, "
    "tie_embeddings: true, embedding_std: null}"
)
OWN = [f"model.decoder={DECODER}", "tokenizer.vocab_size=300"]


def words(cache: Path, *overrides: str) -> list[str]:
    """`key=value` words for vlm-small.yaml; of two for one key the last counts."""
    given = [
        *(f"data.{word}" for word in SCENES),
        f"model.vision={TOWER}",
        "task.questions=4",
        "task.turns=3",
        "task.patch_loss=0.0",
        "task.word_loss=0.0",
        "task.name_loss=0.0",
        "lora.rank=null",
        "precision=fp32",
        f"cache_dir={cache}",
        *overrides,
    ]
    return [f"{key}={value}" for key, value in dict(word.split("=", 1) for word in given).items()]


def prepared(cache: Path, *overrides: str, config: str = "vlm-small.yaml") -> PictureTask:
    """A task with its data."""
    task = build_task(load_config(config, words(cache, *overrides)))
    assert isinstance(task, PictureTask)
    task.check()
    task.prepare(is_main=True)
    return task
