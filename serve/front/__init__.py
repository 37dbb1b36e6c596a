"""Protects the application from the network: size limits, deadlines, access checks, and retries when a replica dies.

`guard` wraps any ASGI application. It runs in the replica, which then depends on nothing before it, and in Ray's proxy
(`proxy`), where a request is read and checked before it takes a place in the replica. `protocol` is uvicorn's HTTP
parser with limits. This package imports neither Ray nor torch, so that the proxy stays small.
"""
