"""Serving: continuous batching for any attention variant, behind an OpenAI-compatible API on Ray Serve."""
