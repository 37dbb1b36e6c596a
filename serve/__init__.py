"""Serving: continuous batching over any attention variant, an OpenAI-compatible API, Ray Serve around it."""
