"""How large embeddings begin."""

import pytest

from attnzoo.models import DecoderConfig, DecoderLM, MultimodalLM

VISION = {"image_size": 16, "patch_size": 4, "model_dim": 24, "num_layers": 1, "attention": "mha"}


@pytest.mark.parametrize(("given", "expected"), [(None, 0.02), (0.7, 0.7)])
def test_embeddings_and_pictures_begin_with_their_own_size(given: float | None, expected: float) -> None:
    """The head and the blocks do not; vectors of pictures are as large as those of words."""
    config = DecoderConfig(vocab_size=300, model_dim=40, num_layers=1, tie_embeddings=False, embedding_std=given)
    lm = DecoderLM(config)
    assert float(lm.embedding.weight.std()) == pytest.approx(expected, rel=0.05)
    assert float(lm.head.weight.std()) == pytest.approx(0.02, rel=0.05)
    model = MultimodalLM.build(VISION, {}, config)
    assert model.pictures.config.unit == expected
