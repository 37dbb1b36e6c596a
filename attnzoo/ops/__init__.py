"""Operations: pure functions of tensors, one folder each with the same files (reference, torch, triton)."""
