"""Generated retrieval tasks: a seed determines each example, which records the positions of its answers."""
