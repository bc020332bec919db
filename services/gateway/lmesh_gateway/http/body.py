"""From a request's bytes to a checked body: bounded, real JSON, every fault with its field."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any, NoReturn, TypeVar

from fastapi import Request
from pydantic import ValidationError

from lmesh_gateway.errors import RequestTooLargeError
from lmesh_gateway.http.errors import BodyTooLateError, MalformedBodyError
from lmesh_gateway.http.schemas import SamplingBody
from lmesh_gateway.http.unsupported import check_extras

Body = TypeVar("Body", bound=SamplingBody)

# A client that is still sending cannot read a refusal. What is over the limit is read on and thrown away, up to this
# many times the limit; whoever sends more finds the connection closed.
_DISCARD_FACTOR = 16
# For the largest body over a slow line; what a client that sends byte by byte can hold is bounded by it.
_READ_TIMEOUT_S = 120.0


async def read_body(request: Request, kind: type[Body], limit: int) -> Body:
    """The request's body as `kind`.

    Raises RequestTooLargeError, BodyTooLateError, MalformedBodyError, UnsupportedParameterError or
    UnknownParameterError.
    """
    try:
        async with asyncio.timeout(_READ_TIMEOUT_S):
            data = await _bytes(request, limit)
    except TimeoutError:
        raise BodyTooLateError(f"the body did not end within {_READ_TIMEOUT_S:g} s") from None
    body = parse(data, kind)
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
        raise RequestTooLargeError(f"the body is larger than {limit} bytes, the most that this gateway takes")
    return bytes(data)


def parse(data: bytes, kind: type[Body]) -> Body:
    """Validates JSON bytes. Raises MalformedBodyError naming the first field at fault."""
    try:
        text = data.decode()
        content = json.loads(text, parse_constant=_refuse_constant)
        if _SURROGATE.search(text):
            _refuse_surrogates(content, ())
    except ValueError as error:  # also of bytes that are not UTF-8, and of integers too long to read
        raise MalformedBodyError(f"the body is not JSON: {error}") from error
    except RecursionError as error:
        raise MalformedBodyError("the body is nested too deeply") from error
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise _malformed(error) from error


def _refuse_constant(name: str) -> NoReturn:
    raise MalformedBodyError(f"{name} is not JSON; write a finite number")


def _refuse_surrogates(node: object, path: tuple[str | int, ...]) -> None:
    """Half of a pair is no character: no tokenizer takes it and no message carries it."""
    if isinstance(node, str):
        if not _is_text(node):
            raise MalformedBodyError(
                f"{_path(path) or 'body'}: holds half of a surrogate pair, which is no character",
                field=_path(path) or None,
            )
    elif isinstance(node, list):
        for index, item in enumerate(node):
            _refuse_surrogates(item, (*path, index))
    elif isinstance(node, dict):
        for key, value in node.items():
            _refuse_surrogates(key, path)
            _refuse_surrogates(value, (*path, key))


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


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


_BRANCHES = frozenset({"str", "int", "bool", "float", "ContentPart"})
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
