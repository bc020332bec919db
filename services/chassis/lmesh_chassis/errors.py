"""Errors that cross a service's border: gRPC code, UPPER_SNAKE reason, and google.rpc details in the trailers."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar, NamedTuple, cast

import grpc
from google.protobuf import any_pb2
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]
from grpc_status import rpc_status

from lmesh_chassis.redaction import redact


class ServiceError(Exception):
    """Base of every error that a caller may see; subclasses state `code`, `reason` and `retryable`.

    The message goes to the caller, so it names the fault and what would be right, and holds no internals.
    `field` is the request field at fault; `retry_after_ms` tells when a retry may help.
    """

    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.INTERNAL
    reason: ClassVar[str] = "INTERNAL"
    retryable: ClassVar[bool] = False

    def __init__(
        self,
        message: str,
        *,
        field: str | None = None,
        retry_after_ms: int | None = None,
        metadata: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.retry_after_ms = retry_after_ms
        self.metadata = dict(metadata or {})


class InternalError(ServiceError):
    """A fault of ours; the caller gets an id to quote, the log has the rest."""


class InvalidArgumentError(ServiceError):
    """A request field that cannot be used as it is."""

    code = grpc.StatusCode.INVALID_ARGUMENT
    reason = "INVALID_ARGUMENT"


class DrainingError(ServiceError):
    """The process is leaving and takes nothing new; another one may."""

    code = grpc.StatusCode.UNAVAILABLE
    reason = "DRAINING"
    retryable = True


class RemoteError(NamedTuple):
    """What an RPC's failure said: `reason` and `field` are empty and `retry_after_ms` None where it said nothing."""

    code: grpc.StatusCode
    reason: str
    message: str
    field: str
    retry_after_ms: int | None
    metadata: Mapping[str, str] = MappingProxyType({})


def to_status(error: ServiceError, domain: str) -> grpc.Status:
    """The status for `context.abort_with_status`, with ErrorInfo and, where they apply, BadRequest and RetryInfo."""
    message = redact(error.message)
    metadata = {**error.metadata, "retryable": "true" if error.retryable else "false"}
    details: list[Message] = [error_details_pb2.ErrorInfo(reason=error.reason, domain=domain, metadata=metadata)]
    if error.field is not None:
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=message)
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if error.retry_after_ms is not None:
        details.append(error_details_pb2.RetryInfo(retry_delay=_duration(error.retry_after_ms)))
    status = status_pb2.Status(code=_number(error.code), message=message, details=[_pack(d) for d in details])
    return cast(grpc.Status, rpc_status.to_status(status))


def from_rpc_error(error: grpc.RpcError) -> RemoteError:
    """Reads an RPC's failure; works for grpc.aio and blocking calls, with or without details in the trailers."""
    call = cast(grpc.aio.AioRpcError, error)
    try:
        status = rpc_status.from_call(call)
    except ValueError:  # the trailer contradicts the status: believe the status
        status = None
    found = RemoteError(call.code(), "", call.details() or "", "", None)
    for detail in status.details if status is not None else ():
        found = _merge(found, detail)
    return found


def _merge(found: RemoteError, detail: any_pb2.Any) -> RemoteError:
    info, bad, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
    if detail.Unpack(info):
        return found._replace(reason=info.reason, metadata=dict(info.metadata))
    if detail.Unpack(bad) and bad.field_violations:
        return found._replace(field=bad.field_violations[0].field)
    if detail.Unpack(retry):
        return found._replace(retry_after_ms=retry.retry_delay.ToMilliseconds())
    return found


def _pack(message: Message) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed


def _duration(milliseconds: int) -> Duration:
    duration = Duration()
    duration.FromMilliseconds(milliseconds)
    return duration


def _number(code: grpc.StatusCode) -> int:
    number: int = code.value[0]
    return number
