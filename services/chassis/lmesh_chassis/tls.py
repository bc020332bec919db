"""TLS of a process: one certificate for all that it serves, one CA for all that it calls; mutual where asked for."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from lmesh_chassis.settings import ChassisSettings, SettingsError


@dataclass(frozen=True, slots=True, kw_only=True)
class Tls:
    """PEM bytes, empty where there are none. Without a certificate servers are plain, without a CA channels are."""

    certificate: bytes = b""
    key: bytes = field(default=b"", repr=False)
    ca: bytes = b""
    require_client_cert: bool = False
    server_name: str = ""  # what peers' certificates must name, instead of the host that was called
    http: ssl.SSLContext | None = field(default=None, repr=False)  # for servers that do not speak gRPC

    def server_credentials(self) -> grpc.ServerCredentials | None:
        """For a gRPC server; None serves plain."""
        if not self.certificate:
            return None
        return grpc.ssl_server_credentials(
            [(self.key, self.certificate)],
            # A client's certificate is looked at only where one is required: a wrong one must not shut out callers
            # who bring API keys.
            root_certificates=self.ca if self.require_client_cert else None,
            require_client_auth=self.require_client_cert,
        )

    def channel_credentials(self) -> grpc.ChannelCredentials | None:
        """For a gRPC channel; None calls plain. The certificate, where there is one, says who calls."""
        if not self.ca:
            return None
        return grpc.ssl_channel_credentials(self.ca, self.key or None, self.certificate or None)


PLAIN = Tls()


def from_settings(settings: ChassisSettings) -> Tls:
    """The files that the tls_* settings name, read and checked. Raises SettingsError."""
    if not settings.tls_cert_file and not settings.tls_ca_file:
        return PLAIN
    return Tls(
        certificate=_read("tls_cert_file", settings.tls_cert_file),
        key=_read("tls_key_file", settings.tls_key_file),
        ca=_read("tls_ca_file", settings.tls_ca_file),
        require_client_cert=settings.tls_require_client_cert,
        server_name=settings.tls_server_name,
        http=_context(settings),
    )


def _read(setting: str, path: str) -> bytes:
    try:
        return Path(path).read_bytes() if path else b""
    except OSError as error:
        raise SettingsError(setting, f"cannot read {path}: {error.strerror}") from None


def _context(settings: ChassisSettings) -> ssl.SSLContext | None:
    """A server's context; made for gRPC too, for it says what is wrong with a file where gRPC does not."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    if settings.tls_ca_file:
        try:
            context.load_verify_locations(cafile=settings.tls_ca_file)
        except ssl.SSLError as error:
            raise SettingsError("tls_ca_file", f"{settings.tls_ca_file} holds no certificate: {error.reason}") from None
    if not settings.tls_cert_file:
        return None
    try:
        # The empty password makes an encrypted key an error instead of a question to the terminal.
        context.load_cert_chain(settings.tls_cert_file, settings.tls_key_file, password="")
    except (ssl.SSLError, ValueError) as error:
        words = getattr(error, "reason", None) or str(error)
        raise SettingsError(
            "tls_cert_file", f"{settings.tls_cert_file} and {settings.tls_key_file} are no pair: {words}"
        ) from None
    if settings.tls_require_client_cert:
        context.verify_mode = ssl.CERT_REQUIRED
    return context
