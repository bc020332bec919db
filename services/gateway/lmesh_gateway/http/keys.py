"""API keys over HTTP: in front of the whole application, so that no route is open by being forgotten."""

from __future__ import annotations

from typing import Any

from fastapi import Request

from lmesh_gateway.authentication import API_KEY, AUTHORIZATION, Authenticator, checked
from lmesh_gateway.errors import UnauthenticatedError
from lmesh_gateway.http.errors import error_response
from lmesh_gateway.http.headers import set_tenant, told_request_id

# What probes, scrapers and readers of the documentation need; nothing that shows a request.
OPEN_PATHS = frozenset({"/health", "/metrics", "/version", "/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json"})

Asgi = Any  # an ASGI application and its parts, in their own loose sense
Scope = Any


class KeyedApp:
    """An ASGI application behind `authenticator`; a refusal is an OpenAI error body with status 401."""

    def __init__(self, app: Asgi, authenticator: Authenticator) -> None:
        self._app = app
        self._authenticator = authenticator

    async def __call__(self, scope: Scope, receive: Asgi, send: Asgi) -> None:
        """Serves one request."""
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            request = Request(scope)
            try:
                set_tenant(request, self._tenant(request))
            except UnauthenticatedError as error:
                headers = {**told_request_id(request), "www-authenticate": "Bearer"}
                await error_response(error, headers)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _tenant(self, request: Request) -> str:
        headers = request.headers
        return checked(self._authenticator, "http", headers.get(AUTHORIZATION, ""), headers.get(API_KEY, ""))
