"""Brings the events of streamed answers from a replica to Ray's proxy on the same machine, beside Ray.

Ray takes about a millisecond of processor time for a message, which is more than a small model takes for a token.
Requests, statuses, ends and cancellations go through Ray, so that it routes, counts and watches as ever; only the
events between an answer's start and its end come through one socket, those of all answers together. Where that socket
cannot be reached (a proxy on another machine, a system without abstract sockets) events go through Ray, too.
"""
