"""The dtype in which the products of prompts are computed: as asked for, or the faster one by a short measurement."""

from attnzoo.models import DecoderLM, can_widen, widen_products
from attnzoo.models.widening import product_times
from attnzoo.types import parse_dtype
from serve.faults import logger

GAIN = 0.9
"""float32 must take at most this part of the other's time to be chosen."""


def check_prompt_dtype(asked: str, weights: str | None) -> None:
    """Raises ValueError for what is neither "auto", nor float32, nor the dtype of the weights, where that is known."""
    if asked == "auto":
        return
    try:
        dtype = parse_dtype(asked)
    except ValueError:
        raise ValueError(
            f"prompt_dtype={asked!r} is not known; give auto, float32, or the dtype of the weights"
        ) from None
    if weights is not None and dtype not in (parse_dtype("float32"), parse_dtype(weights)):
        raise ValueError(
            f"prompt_dtype={asked!r} with weights in {weights}: a product is computed in the weights' dtype or in "
            f"float32; leave prompt_dtype out, or serve the weights in it, too: dtype={asked}"
        )


def apply_prompt_dtype(model: DecoderLM, asked: str) -> None:
    """Has the model compute prompts as asked; "auto" measures, where there is a choice, and logs it. Raises ValueError
    as `check_prompt_dtype`, and for float32 where the device or the weights leave no choice."""
    weights = str(model.embedding.weight.dtype).removeprefix("torch.")
    check_prompt_dtype(asked, weights)
    if not can_widen(model):
        device = model.embedding.weight.device
        if asked != "auto" and parse_dtype(asked) != model.embedding.weight.dtype:
            raise ValueError(
                f"prompt_dtype={asked!r}: products of weights in {weights} on {device} are not computed in another "
                "dtype; leave prompt_dtype out"
            )
        return
    if asked == "auto":
        own_s, wide_s = product_times(model)
        asked = "float32" if wide_s <= GAIN * own_s else weights
        logger.info(
            "prompts are computed in %s: a product takes %.3f ms in %s and %.3f ms in float32; prompt_dtype chooses",
            asked,
            1000 * own_s,
            weights,
            1000 * wide_s,
        )
    if parse_dtype(asked) != model.embedding.weight.dtype:
        widen_products(model)
