"""Beginnings of prompts that were read before: their keys, values and states are copied, not computed again."""

from serve.prefix.cache import PrefixCache, PrefixPlan

__all__ = ["PrefixCache", "PrefixPlan"]
