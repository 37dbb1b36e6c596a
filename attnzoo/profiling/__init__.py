"""Measures the memory of a call from the allocator's records."""
