"""What lets the command into a mesh with TLS and API keys: LMESH_API_KEY and LMESH_TLS_* variables."""

from __future__ import annotations

import os
import ssl
from pathlib import Path

import grpc
import grpc.aio
from lmesh_chassis.keepalive import DEFAULT_MAX_MESSAGE_BYTES, Keepalive, link_options

API_KEY = "LMESH_API_KEY"
CA_FILE = "LMESH_TLS_CA_FILE"
CERT_FILE = "LMESH_TLS_CERT_FILE"  # with CERT_KEY_FILE, for a mesh that asks its callers for certificates
CERT_KEY_FILE = "LMESH_TLS_KEY_FILE"
SERVER_NAME = "LMESH_TLS_SERVER_NAME"


class AccessError(RuntimeError):
    """A variable that cannot be used; the text names it."""


def api_key() -> tuple[tuple[str, str], ...]:
    """Call metadata with the caller's API key, where one is set."""
    key = os.environ.get(API_KEY, "").strip()
    return (("authorization", f"Bearer {key}"),) if key else ()


def channel(address: str) -> grpc.Channel:
    """A blocking channel to a service of the mesh. Raises AccessError."""
    credentials = _credentials()
    if credentials is None:
        return grpc.insecure_channel(address, options=_options())
    return grpc.secure_channel(address, credentials, options=_options())


def aio_channel(address: str) -> grpc.aio.Channel:
    """The same for asyncio, with a connection of its own.

    Channels to one address share one else, and of several processes on a port all of them would ask the same.
    """
    credentials, options = _credentials(), [*_options(), ("grpc.use_local_subchannel_pool", 1)]
    if credentials is None:
        return grpc.aio.insecure_channel(address, options=options)
    return grpc.aio.secure_channel(address, credentials, options=options)


def http_context() -> ssl.SSLContext | None:
    """For HTTPS to the mesh; None where it is plain HTTP. Raises AccessError."""
    if not _path(CA_FILE):
        return None
    try:
        context = ssl.create_default_context(cafile=_path(CA_FILE))
        if _path(CERT_FILE):
            context.load_cert_chain(_path(CERT_FILE), _path(CERT_KEY_FILE), password="")
    except OSError as error:  # of which ssl.SSLError is one
        raise AccessError(f"{CA_FILE}, {CERT_FILE} or {CERT_KEY_FILE} cannot be used: {error.strerror}") from None
    return context


def server_name() -> str:
    """The name in the mesh's certificates; "" where it is the host that is called."""
    return os.environ.get(SERVER_NAME, "").strip()


def _credentials() -> grpc.ChannelCredentials | None:
    if not _path(CA_FILE):
        return None
    return grpc.ssl_channel_credentials(_read(CA_FILE), _read(CERT_KEY_FILE), _read(CERT_FILE))


def _options() -> list[tuple[str, int | str]]:
    # A proxy meant for the outside must not get calls to this machine.
    options = [*link_options(Keepalive(), DEFAULT_MAX_MESSAGE_BYTES), ("grpc.enable_http_proxy", 0)]
    name = server_name()
    return [*options, ("grpc.ssl_target_name_override", name)] if name and _path(CA_FILE) else options


def _path(variable: str) -> str:
    return os.environ.get(variable, "").strip()


def _read(variable: str) -> bytes | None:
    path = _path(variable)
    try:
        return Path(path).read_bytes() if path else None
    except OSError as error:
        raise AccessError(f"{variable}: cannot read {path}: {error.strerror}") from None
