"""The OpenAI-compatible HTTP interface: `protocol` says what is accepted, `routes` answers."""
