"""Who calls: an API key's tenant, found without telling by its timing how near a wrong key was."""

from __future__ import annotations

import hmac
import secrets
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from contextvars import ContextVar
from hashlib import sha256
from typing import Any

import grpc
from lmesh_chassis.api_keys import MAX_KEY_LENGTH, digest_of
from lmesh_chassis.interceptors import AroundInterceptor
from lmesh_chassis.settings import SettingsError
from lmesh_chassis.tenants import ANYONE, Tenant, load_tenants

from lmesh_gateway.errors import UnauthenticatedError
from lmesh_gateway.metrics import UNAUTHENTICATED

AUTHORIZATION, API_KEY = "authorization", "x-api-key"
# Whether a server lives and what it offers is open to all; everything else is not, what is added later included.
OPEN_SERVICES = (
    "/grpc.health.v1.Health/",
    "/grpc.reflection.v1alpha.ServerReflection/",
    "/grpc.reflection.v1.ServerReflection/",
)

RpcContext = Any  # grpc's own type leaves its messages open

# The tenant of the gRPC call that this task serves. HTTP has it in the request's state.
caller: ContextVar[str] = ContextVar("lmesh_tenant", default=ANYONE.id)


class Authenticator:
    """Tenants by API key; without tenants everybody is `ANYONE` and no key is asked for."""

    def __init__(self, tenants: Mapping[str, Tenant] | None = None) -> None:
        self._required = tenants is not None
        # Digests are looked up under a tag that a caller cannot compute, and then compared in constant time.
        self._secret = secrets.token_bytes(32)
        self._known = {
            self._tag(digest): (digest, tenant) for tenant in (tenants or {}).values() for digest in tenant.key_digests
        }
        self._decoy = (secrets.token_hex(32), ANYONE)

    @classmethod
    def from_file(cls, path: str) -> Authenticator:
        """Over a tenants file; "" is an open mesh. Raises SettingsError."""
        if not path:
            return cls()
        try:
            return cls(load_tenants(path))
        except (OSError, ValueError) as error:
            raise SettingsError("LMESH_GATEWAY_TENANTS_FILE", str(error)) from error

    def tenant_of(self, authorization: str, api_key: str) -> Tenant:
        """The caller's tenant by its two headers, "" where there is none; UnauthenticatedError for every refusal.

        An Authorization header that is there must be right, whatever else is sent.
        """
        if not self._required:
            return ANYONE
        if not authorization and not api_key:
            raise UnauthenticatedError("an API key is needed: send it as `Authorization: Bearer <key>` or `x-api-key`")
        key = _bearer(authorization) if authorization else api_key
        digest = digest_of(key[:MAX_KEY_LENGTH])
        known, tenant = self._known.get(self._tag(digest), self._decoy)
        if not hmac.compare_digest(known, digest) or len(key) > MAX_KEY_LENGTH:
            raise UnauthenticatedError("the API key is not known here")
        return tenant

    def _tag(self, digest: str) -> bytes:
        return hmac.digest(self._secret, digest.encode(), sha256)


def _bearer(authorization: str) -> str:
    scheme, _, key = authorization.partition(" ")
    key = key.strip()
    if scheme.lower() != "bearer" or not key:
        raise UnauthenticatedError("the Authorization header must be `Bearer <API key>`")
    return key


def interceptor(authenticator: Authenticator) -> grpc.aio.ServerInterceptor:
    """Refuses every gRPC call without a known key, but for OPEN_SERVICES, and sets `caller` for the others."""

    @asynccontextmanager
    async def authenticated(method: str, context: RpcContext) -> AsyncIterator[None]:
        if not method.startswith(OPEN_SERVICES):
            metadata = dict(context.invocation_metadata() or ())
            caller.set(checked(authenticator, "grpc", _text(metadata, AUTHORIZATION), _text(metadata, API_KEY)))
        yield

    return AroundInterceptor(authenticated)


def checked(authenticator: Authenticator, face: str, authorization: str, api_key: str) -> str:
    """The id of the caller's tenant; a refusal is counted under `face`. Raises UnauthenticatedError."""
    try:
        return authenticator.tenant_of(authorization, api_key).id
    except UnauthenticatedError:
        UNAUTHENTICATED.labels(face=face).inc()
        raise


def _text(metadata: Mapping[str, str | bytes], name: str) -> str:
    value = metadata.get(name, "")
    return value if isinstance(value, str) else ""
