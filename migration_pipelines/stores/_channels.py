"""Options of gRPC channels, the same for every connector that opens one."""

from __future__ import annotations

OPTIONS = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.enable_retries", 0),
    # A channel that lost its server fails every call at once until it looks again, after up to two minutes:
    # how long to wait is for the engine's retries to say. `min_reconnect_backoff_ms` isn't set: it limits
    # how long a connection may take to be made as well.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.use_local_subchannel_pool", 1),
)
