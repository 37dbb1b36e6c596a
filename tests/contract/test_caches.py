"""Every cache policy keeps the contract with every variant that has keys."""

import pytest
import torch

from attnzoo.kvcache import CACHES, compressed
from tests.contract.caches import (
    CHECKS,
    LOSSLESS,
    POLICIES,
    VARIANTS,
    check_everything_kept,
    check_registered,
    registered_model,
)
from tests.contract.cases import all_cases, build_case, case_name

FULL_MATRIX = "gqa"
"""The variant that meets every policy and check; the others meet the policies that read their scores differently."""
SCORES_READ = ("think", "d2o", "d2o+think", "snapkv")


@pytest.fixture(autouse=True)
def small_pages(monkeypatch):
    """Tails of the contract's short sequences cross pages."""
    monkeypatch.setattr(compressed, "PAGE", 4)


def cases() -> list:
    more = {"rcmha": ("d2o-merge_counts", "think-recomputed", "streaming")}
    chosen = [
        (v, p) for v in VARIANTS for p in POLICIES if v == FULL_MATRIX or p in SCORES_READ or p in more.get(v, ())
    ]
    return [pytest.param(v, p, id=f"{v}-{p}") for v, p in chosen]


def test_every_policy_is_tested():
    assert set(LOSSLESS) == set(CACHES)
    assert {kind for kind, _ in POLICIES.values()} | {"full"} == set(CACHES)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize(("variant", "policy"), cases())
def test_cache(variant, policy, check):
    CHECKS[check](variant, policy)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("kind", "options"),
    [(k, o) for k, many in LOSSLESS.items() for o in many],
    ids=lambda x: x if isinstance(x, str) else "-".join(f"{k}={v}" for k, v in x.items()),
)
def test_everything_kept_is_the_full_cache(variant, kind, options):
    for dtype in (torch.float64, torch.bfloat16) if variant in (FULL_MATRIX, "rcmha") else (torch.float64,):
        check_everything_kept(variant, kind, options, dtype)


BEFORE_THE_CACHE = {"qkv_bias", "qk_norm", "rope_scaling", "conv_share_heads"}
"""Options that change what enters a cache, not how it is read: the same code runs without them."""
REGISTERED = [
    pytest.param(kind, options, id=case_name(kind, options))
    for kind, options in all_cases()
    if not BEFORE_THE_CACHE & options.keys()
]


@pytest.mark.parametrize(("kind", "options"), REGISTERED)
def test_every_registered_variant_has_every_policy_or_says_why(kind, options):
    """Plug-ins included. What is not causal is refused by the decoder."""
    if build_case(kind, options).traits.causal:
        check_registered(kind, options)
    else:
        with pytest.raises(ValueError, match="not causal"):
            registered_model(kind, options, 2)
