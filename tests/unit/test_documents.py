"""Packed documents from the tokens to the loss: a token sees its own document only."""

import pytest
import torch

from attnzoo.attention.base import Traits
from attnzoo.models import DecoderConfig, DecoderLM
from attnzoo.tokenizer import SentencePieceTokenizer
from train.config import Config
from train.tasks import LanguageTask

BOS = SentencePieceTokenizer.bos_id


def model(attention: object = "rcmha") -> DecoderLM:
    torch.manual_seed(0)
    config = DecoderConfig(
        vocab_size=19, model_dim=16, num_layers=2, attention=attention, max_positions=32, init_std=0.3
    )
    return DecoderLM(config).double()


def loss(lm: DecoderLM, document_start: int | None) -> torch.Tensor:
    """The language task's mean loss of `rows`."""
    task = LanguageTask(Config())
    task.document_start = document_start
    return task.loss(lm, rows(), count=None)


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    """Two rows of 12 tokens: documents of 5 and 7, and the rest of one of 3 with one of 9."""
    tokens = torch.randint(4, 19, (2, 13), generator=torch.Generator().manual_seed(1))
    tokens[0, 0], tokens[0, 5], tokens[1, 3] = BOS, BOS, BOS
    return tokens[:, :-1], tokens[:, 1:]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("attention", ["mha", "rcmha", ["mdha", "linear"]], ids=str)
def test_isolated_loss_is_that_of_the_documents_alone(attention, checkpointing):
    lm, (tokens, targets) = model(attention), rows()
    lm.activation_checkpointing = checkpointing
    isolated = loss(lm, document_start=BOS)
    pieces = [(0, 0, 5), (0, 5, 12), (1, 0, 3), (1, 3, 12)]
    alone = sum(
        lm.loss(tokens[row : row + 1, first:end], targets[row : row + 1, first:end]) * (end - first)
        for row, first, end in pieces
    )
    # The loss is taken in float32 in whatever dtype the model is.
    torch.testing.assert_close(isolated, alone / 24, rtol=24 * torch.finfo(torch.float32).eps, atol=0)
    together = loss(lm, document_start=None)
    assert abs(together - isolated) > 1e-3
    for got, want in zip(
        torch.autograd.grad(isolated, lm.parameters()), torch.autograd.grad(alone / 24, lm.parameters()), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


def test_a_variant_that_cannot_keep_documents_apart_is_refused(monkeypatch):
    lm = model()
    monkeypatch.setattr(type(lm.blocks[0].attention), "traits", Traits())
    with pytest.raises(ValueError, match="RCMHA cannot keep documents of one row apart"):
        loss(lm, document_start=BOS)


def test_an_explicit_implementation_reaches_every_layer():
    config = DecoderConfig(vocab_size=19, model_dim=16, num_layers=2, attention="rcmha", attention_impl="reference")
    lm = DecoderLM(config)
    assert [block.attention.impl for block in lm.layers()] == ["reference", "reference"]
    tokens = torch.randint(4, 19, (1, 9))
    fast = DecoderLM(DecoderConfig(**{**config.to_dict(), "attention_impl": "torch"}))
    fast.load_state_dict(lm.state_dict())
    torch.testing.assert_close(lm(tokens), fast(tokens), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="attention_impl='cuda' is not one of"):
        DecoderConfig.from_dict({**config.to_dict(), "attention_impl": "cuda"})
