"""From a request's bytes to a checked body: bounded, real JSON, every fault with its field."""

from __future__ import annotations

import json
from typing import Any, NoReturn, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError

from lmesh_gateway.http.errors import BodyTooLargeError, MalformedBodyError
from lmesh_gateway.http.unsupported import check_extras

Body = TypeVar("Body", bound=BaseModel)

# A client that is still sending cannot read a refusal. What is over the limit is read on and thrown away, up to this
# many times the limit; whoever sends more finds the connection closed.
_DISCARD_FACTOR = 16


async def read_body(request: Request, kind: type[Body], limit: int) -> Body:
    """The request's body as `kind`.

    Raises BodyTooLargeError, MalformedBodyError, UnsupportedParameterError or UnknownParameterError.
    """
    body = parse(await _bytes(request, limit), kind)
    check_extras(body)
    return body


async def _bytes(request: Request, limit: int) -> bytes:
    data, size = bytearray(), 0
    declared = request.headers.get("content-length", "")
    too_large = declared.isdigit() and int(declared) > limit
    async for chunk in request.stream():
        size += len(chunk)
        too_large = too_large or size > limit
        if size > _DISCARD_FACTOR * limit:
            break
        if too_large:
            data.clear()
        else:
            data += chunk
    if too_large:
        raise BodyTooLargeError(f"the body is larger than {limit} bytes, the most that this gateway takes")
    return bytes(data)


def parse(data: bytes, kind: type[Body]) -> Body:
    """Validates JSON bytes. Raises MalformedBodyError naming the first field at fault."""
    try:
        content = json.loads(data, parse_constant=_refuse_constant)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise MalformedBodyError(f"the body is not JSON: {error}") from error
    except RecursionError as error:
        raise MalformedBodyError("the body is nested too deeply") from error
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise _malformed(error) from error


def _refuse_constant(name: str) -> NoReturn:
    raise MalformedBodyError(f"{name} is not JSON; write a finite number")


def _malformed(error: ValidationError) -> MalformedBodyError:
    faults = error.errors(include_url=False, include_input=False)
    # Of a union's branches the deepest got furthest, so it says best what is wrong.
    first = str(faults[0]["loc"][0]) if faults[0]["loc"] else ""
    same = [f for f in faults if f["loc"] and str(f["loc"][0]) == first]
    fault = max(same, key=lambda f: len(f["loc"]), default=faults[0])
    field = _path(fault["loc"])
    return MalformedBodyError(f"{field or 'body'}: {fault['msg']}", field=field or None)


def _path(location: tuple[Any, ...]) -> str:
    """`messages[0].content`; the names of a union's branches, which say nothing to a client, left out."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif not path:
            path = str(part)
        elif str(part).isidentifier() and str(part) not in _BRANCHES:
            path += f".{part}"
    return path


_BRANCHES = frozenset({"str", "int", "bool", "float", "TextPart"})
