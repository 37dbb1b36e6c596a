"""What a prompt and a decode step cost, computed without running the model."""

from dataclasses import dataclass

from attnzoo.kvcache import CachePolicy
from attnzoo.kvcache.choice import FULL
from attnzoo.models import DecoderLM
from attnzoo.models.cache_use import policy_name


@dataclass(frozen=True)
class StepCost:
    """The cost of one forward pass for all sequences.

    flops: floating point operations; a multiply-add counts as two. bytes_moved: lower bound of the memory traffic:
    weights, activations, and the state once. kv_bytes: memory of the state after the pass. Some cache policies hold new
    tokens in pages of 64, which count whole; `CacheUse`, in answers, counts only what tokens fill.
    """

    flops: int
    bytes_moved: int
    kv_bytes: int


@dataclass(frozen=True)
class GenerationCost:
    """The cost of a prompt and of one decode step after it. policy: name of the cache policy. Bytes are those of the
    policy; flops are those of the full cache, an upper bound for a policy that keeps fewer tokens."""

    prompt: StepCost
    decode: StepCost
    policy: str


def generation_cost(model: DecoderLM, tokens: int, batch: int, policy: CachePolicy | None) -> GenerationCost:
    """The cost of `batch` prompts of `tokens` tokens, and of one decode step after them. policy: None is exact."""
    kv: tuple[int | None, int | None] = (None, None)
    if policy is not None:
        sizes = model.byte_model(policy)
        kv = (batch * sizes.reading(tokens), batch * sizes.compressed(tokens, 1))
    read = _step_cost(model, batch, tokens, tokens, kv[0])
    step = _step_cost(model, batch, 1, tokens + 1, kv[1])
    return GenerationCost(read, step, FULL if policy is None else policy_name(policy))


def _step_cost(model: DecoderLM, batch: int, tokens: int, context: int, kv_bytes: int | None) -> StepCost:
    cost = model.cost(batch, tokens, context)
    kv_bytes = cost.state_bytes if kv_bytes is None else kv_bytes
    return StepCost(cost.flops, cost.bytes_moved - cost.state_bytes + kv_bytes, kv_bytes)
