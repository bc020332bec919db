"""HTTP/2 settings that both ends of a link must agree on: pings that keep a quiet stream alive, and message size."""

from __future__ import annotations

from dataclasses import dataclass

# 128 k ids with prompt log-probabilities pass gRPC's default of 4 MiB; a prefill chunk's share stays well below this.
DEFAULT_MAX_MESSAGE_BYTES = 16 * 2**20

# Metadata of one call, both directions: a trace, ids, an API key. Error details travel in it too.
DEFAULT_MAX_METADATA_BYTES = 16 * 2**10
# A connection that has not greeted by then is closed; so is one without calls after the longer time.
_HANDSHAKE_MS = 10_000
_IDLE_MS = 15 * 60_000

Options = list[tuple[str, int | str]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Keepalive:
    """How often a quiet connection is pinged, and how long the answer may take before it is given up."""

    time_s: float = 20.0
    timeout_s: float = 10.0


def link_options(keepalive: Keepalive, max_message_bytes: int, max_send_bytes: int | None = None) -> Options:
    """Options for a server and for a channel alike; `max_send_bytes` None is as much as may be received, -1 any."""
    return [
        ("grpc.keepalive_time_ms", round(keepalive.time_s * 1000)),
        ("grpc.keepalive_timeout_ms", round(keepalive.timeout_s * 1000)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),  # 0: without limit, a stream may be quiet for hours
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes if max_send_bytes is None else max_send_bytes),
    ]


def server_options(keepalive: Keepalive, max_message_bytes: int, max_send_bytes: int | None = None) -> Options:
    """Options for a server: it must not punish a client for pinging a quiet stream."""
    return [
        *link_options(keepalive, max_message_bytes, max_send_bytes),
        ("grpc.http2.min_ping_interval_without_data_ms", 1),
        ("grpc.http2.max_ping_strikes", 0),
        # Equal limits: between them gRPC would refuse at random.
        ("grpc.max_metadata_size", DEFAULT_MAX_METADATA_BYTES),
        ("grpc.absolute_max_metadata_size", DEFAULT_MAX_METADATA_BYTES),
        ("grpc.server_handshake_timeout_ms", _HANDSHAKE_MS),
        ("grpc.max_connection_idle_ms", _IDLE_MS),
    ]
