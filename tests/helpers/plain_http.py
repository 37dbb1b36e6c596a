"""Clients of httpx that need no TLS: imported for its effect by what starts servers for tests."""

from functools import cache

import httpx._transports.default as transports

# A client reads the certificates of all authorities when it is made, 25 ms each time; here all clients share one
# reading, and no server of a test is asked over TLS.
transports.create_ssl_context = cache(transports.create_ssl_context)
