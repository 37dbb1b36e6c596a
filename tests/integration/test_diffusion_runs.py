"""A diffusion model is trained by the same loop as other models: whole runs on two ranks."""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from attnzoo.vision import load_diffusion
from tests.helpers.emoji_fonts import needs
from tests.helpers.training import ROOT, launch, stay_records

CONFIG = """\
base: {base}
name: tiny
cache_dir: {cache}
data: {{kinds: 4, images: 64, validation_images: 24}}
model: {{widths: [16], patch: 4, num_heads: 2, text_dim: 16, text_layers: 1}}
schedule: {{warmup_steps: 5}}
train: {{steps: 40, batch_size: 16, micro_batch_size: 4, threads: 1}}
eval: {{every: 20, batch_size: 7}}
log: {{every: 1, progress: false, tensorboard: false}}
checkpoint: {{every: null}}
"""


@needs("openmoji")
def test_a_run_resumes_bit_for_bit_learns_and_draws(tmp_path: Path) -> None:
    config, whole, split = tmp_path / "tiny.yaml", tmp_path / "whole", tmp_path / "split"
    names = {"base": ROOT / "configs" / "diffusion-emoji.yaml", "cache": tmp_path / "cache"}
    config.write_text(CONFIG.format(**names), encoding="utf-8")
    launch(config, f"run_dir={whole}")
    launch(config, f"run_dir={split}", "train.stop_at_step=30")
    launch(config, f"run_dir={split}")
    one, other = ({k: {n: v for n, v in r.items() if n != "images_per_second"} for k, r in stay_records(run).items()}
                  for run in (whole, split))  # fmt: skip
    assert one == other
    weights, again = (load_file(run / "export" / "model.safetensors") for run in (whole, split))
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert one["eval", 40]["loss"] < 0.8 * one["train", 1]["loss"]
    images = load_diffusion(split).draw(["a photo of an apple on a red plain background"], [0], steps=3)
    assert np.isfinite(images.numpy()).all()
