"""What stands between the network and the application: bounds, deadlines, who may ask, and what when a replica dies.

`guard` wraps any ASGI application and runs twice: in the replica, so that nothing depends on what is before it, and in
Ray's proxy (`proxy`), where a request is read and judged before it takes one of the replica's places. `protocol` is
uvicorn's HTTP parser with bounds. Nothing here imports Ray or torch: the proxy stays small.
"""
