"""What a call takes, measured: bytes from the allocator's own records."""
