"""What the worker refuses, with gRPC code and reason; and how its engine fails."""

from __future__ import annotations

import grpc
from lmesh_chassis.errors import ServiceError

DOMAIN = "lmesh.worker"

# Reasons of sequences that end with ERROR; they ride in StepOutputs, not in a status. See also start_check.
ENGINE_DIED = "ENGINE_DIED"
SLOT_IN_USE = "SLOT_IN_USE"
# Of an adapter that cannot be fetched; it rides in AdapterState.
ARTIFACTS_DISABLED = "ARTIFACTS_DISABLED"


class HelloRequiredError(ServiceError):
    """The stream did not begin with a hello, or a second one came."""

    code = grpc.StatusCode.INVALID_ARGUMENT
    reason = "HELLO_REQUIRED"


class StaleEpochError(ServiceError):
    """The placement was for an earlier boot of this worker."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    reason = "STALE_EPOCH"


class ReplayGoneError(ServiceError):
    """Outputs after the wanted step are no longer held; the gateway's sequences here are gone."""

    code = grpc.StatusCode.OUT_OF_RANGE
    reason = "REPLAY_GONE"


class SlowConsumerError(ServiceError):
    """The gateway fell too far behind; its sequences were aborted so that others are not held up."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "SLOW_CONSUMER"


class SupersededError(ServiceError):
    """A newer stream of the same gateway took this one's place."""

    code = grpc.StatusCode.ABORTED
    reason = "SUPERSEDED"


class NotReadyError(ServiceError):
    """The engine still loads."""

    code = grpc.StatusCode.UNAVAILABLE
    reason = "NOT_READY"
    retryable = True


class EngineDiedError(ServiceError):
    """The engine process is gone; this worker is leaving."""

    code = grpc.StatusCode.UNAVAILABLE
    reason = ENGINE_DIED
    retryable = True


class EngineFailedError(Exception):
    """The engine could not start or go on; `reason` is its own or ENGINE_DIED."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(f"{reason}: {message}")
        self.reason = reason
        self.message = message
