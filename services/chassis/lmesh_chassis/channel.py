"""Channels to other services: keepalive that quiet streams survive, and retries of UNAVAILABLE only."""

from __future__ import annotations

import json

import grpc

from lmesh_chassis.keepalive import DEFAULT_MAX_MESSAGE_BYTES, Keepalive, Options, link_options
from lmesh_chassis.tls import PLAIN, Tls

# Calls that failed before their first message are tried again; a stream that has begun never is. No `timeout` here:
# in a service config it cuts calls at once, so every call passes its own.
_SERVICE_CONFIG = json.dumps(
    {
        "methodConfig": [
            {
                "name": [{}],
                "retryPolicy": {
                    "maxAttempts": 3,
                    "initialBackoff": "0.1s",
                    "maxBackoff": "2s",
                    "backoffMultiplier": 2,
                    "retryableStatusCodes": ["UNAVAILABLE"],
                },
            }
        ],
        "retryThrottling": {"maxTokens": 20, "tokenRatio": 0.5},
    }
)


def connect(
    address: str,
    *,
    domain: str = "lmesh",
    max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
    keepalive: Keepalive | None = None,
    retries: bool = True,
    tls: Tls = PLAIN,
) -> grpc.aio.Channel:
    """A channel to host:port or unix:path; connects on first use and reconnects by itself.

    `domain` names the caller in the user agent. Links that reconnect on their own pass `retries=False`.
    """
    options: Options = [
        *link_options(keepalive or Keepalive(), max_message_bytes),
        ("grpc.primary_user_agent", domain),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 500),
        ("grpc.enable_retries", 1 if retries else 0),
    ]
    if retries:
        options.append(("grpc.service_config", _SERVICE_CONFIG))
    credentials = tls.channel_credentials()
    if credentials is None:
        return grpc.aio.insecure_channel(address, options=options)
    if tls.server_name:
        options.append(("grpc.ssl_target_name_override", tls.server_name))
    return grpc.aio.secure_channel(address, credentials, options=options)
