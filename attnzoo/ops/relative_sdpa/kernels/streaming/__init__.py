"""Arbitrary positions, forward only: what a cache serves."""
