"""Measures compressed KV caches: what they retain, their size, and their speed."""
