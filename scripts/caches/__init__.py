"""Compressed KV caches measured honestly: what they keep, what they cost, how fast they are."""
