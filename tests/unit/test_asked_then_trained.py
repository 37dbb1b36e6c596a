"""A process that has asked a model in inference mode can train one: nothing that is kept for later is of that mode."""

import pytest
import torch

from attnzoo.models import DecoderConfig, DecoderLM
from attnzoo.ops.sinusoid_sdpa import waves
from tests.helpers.serving import KINDS, TOKENS


@pytest.mark.parametrize("kind", KINDS)
def test_training_follows_inference(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waves, "_TABLES", {})
    torch.manual_seed(0)
    layers = [spec | {"num_heads": 4} for spec in KINDS[kind]]
    shape = {"vocab_size": TOKENS, "model_dim": 32, "num_layers": len(layers), "max_positions": 32}
    model = DecoderLM(DecoderConfig(attention=layers, **shape))
    tokens_BT = torch.randint(3, TOKENS, (2, 24))
    with torch.inference_mode():
        model(tokens_BT)
        model.extend(tokens_BT, model.init_state(2, 24))
    model.loss(tokens_BT[:, :-1], tokens_BT[:, 1:]).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())
