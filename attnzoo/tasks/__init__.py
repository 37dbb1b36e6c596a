"""Generated tasks: every example follows from its seed, and says where its answers stand."""
