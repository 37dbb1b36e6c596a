"""The OpenAI-compatible HTTP interface: `protocol` defines the requests, `routes` answers them."""
