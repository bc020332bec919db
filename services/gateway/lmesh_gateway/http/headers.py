"""What request headers say: ids, traces, deadlines."""

from __future__ import annotations

import re
import uuid

from fastapi import Request

from lmesh_gateway.errors import InvalidArgumentError
from lmesh_gateway.generation import DETACH_TTL_S
from lmesh_gateway.validation import is_request_id

REQUEST_ID = "x-request-id"
TIMEOUT_MS = "x-lmesh-timeout-ms"
TRACEPARENT = "traceparent"
ON_DISCONNECT = "x-lmesh-on-disconnect"
DURABILITY = "x-lmesh-durability"
_DETACH = re.compile(r"detach(?:\s*;\s*ttl\s*=\s*(\d{1,6}(?:\.\d{1,6})?))?", re.ASCII)
_LONGEST_TIMEOUT_DIGITS = 12  # 31 years; nothing longer is a timeout, and Python refuses to read very long numbers


def request_id(request: Request) -> str:
    """The call's id: the client's own, or one drawn now and the same from then on. Not checked here."""
    if not hasattr(request.state, "request_id"):
        request.state.request_id = request.headers.get(REQUEST_ID) or str(uuid.uuid4())
    found: str = request.state.request_id
    return found


def told_request_id(request: Request) -> dict[str, str]:
    """The response header that names the call, refused calls too; nothing for an id that is none."""
    found = request_id(request)
    return {REQUEST_ID: found} if is_request_id(found) else {}


def set_tenant(request: Request, tenant: str) -> None:
    """Whose call it is, as its API key says."""
    request.state.tenant = tenant


def tenant(request: Request) -> str:
    """Whose call it is; "" where no keys are asked for."""
    found: str = getattr(request.state, "tenant", "")
    return found


def traceparent(request: Request) -> str:
    """The client's trace context."""
    return request.headers.get(TRACEPARENT, "")


def deadline_s(request: Request) -> float | None:
    """The client's deadline in seconds. Raises InvalidArgumentError for what is no positive number."""
    text = request.headers.get(TIMEOUT_MS)
    if text is None:
        return None
    # isdigit alone takes digits that int() does not, such as a superscript two.
    readable = text.isascii() and text.isdigit() and len(text) <= _LONGEST_TIMEOUT_DIGITS
    if not readable or int(text) == 0:
        raise InvalidArgumentError(f"{TIMEOUT_MS}: must be a positive number of milliseconds", field=TIMEOUT_MS)
    return int(text) / 1000


def detach_ttl_s(request: Request) -> float | None:
    """How long the request is to run on without its client, in seconds; None: it is cancelled with it."""
    text = request.headers.get(ON_DISCONNECT, "cancel").strip().lower()
    if text == "cancel":
        return None
    found = _DETACH.fullmatch(text)
    if found is None:
        raise InvalidArgumentError(f"{ON_DISCONNECT}: must be cancel, detach or detach; ttl=60", field=ON_DISCONNECT)
    return DETACH_TTL_S if found[1] is None else float(found[1])


def sync(request: Request) -> bool:
    """Whether ids are to be shown only when the ledger has them."""
    text = request.headers.get(DURABILITY, "async").strip().lower()
    if text not in ("async", "sync"):
        raise InvalidArgumentError(f"{DURABILITY}: must be async or sync", field=DURABILITY)
    return text == "sync"
