"""A client of lmesh over gRPC: python lmesh_client.py chat "What is a mesh?" (or: models, error, cancel, resume)."""

from __future__ import annotations

import argparse
import os
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator

import grpc
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from lmesh.inference.v1 import inference_pb2 as pb
from lmesh.inference.v1.inference_pb2_grpc import InferenceServiceStub

TARGET = os.environ.get("LMESH_TARGET", "127.0.0.1:50051")
MODEL = os.environ.get("LMESH_MODEL", "smollm2-135m-instruct")
KEY = os.environ.get("LMESH_API_KEY", "")
METADATA = (("x-api-key", KEY),) if KEY else ()
TIMEOUT_S = 120.0


def main() -> int:
    """The exit status: 0, or 1 when the mesh refused what should have worked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=sorted(COMMANDS))
    parser.add_argument("question", nargs="?", default="What is the capital of France?")
    arguments = parser.parse_args()
    with grpc.insecure_channel(TARGET) as channel:
        try:
            COMMANDS[arguments.command](InferenceServiceStub(channel), arguments.question)
        except grpc.RpcError as error:
            show_error(error)
            return 1
    return 0


def request_for(question: str, *, max_tokens: int = 128) -> pb.GenerateRequest:
    """A greedy conversation of one turn."""
    return pb.GenerateRequest(
        model=MODEL,
        chat=pb.ChatInput(messages=[pb.ChatMessage(role="user", content=question)]),
        sampling=pb.SamplingParams(temperature=0),
        stop=pb.StopParams(max_tokens=max_tokens),
        request_id=str(uuid.uuid4()),
    )


def show(events: Iterable[pb.GenerateResponse]) -> None:
    """Prints the text as it comes, and the usage at the end."""
    for event in events:
        if event.WhichOneof("event") == "delta":
            print(event.delta.text, end="", flush=True)
        elif event.WhichOneof("event") == "finish":
            usage = event.finish.usage
            print(f"\nusage: prompt={usage.prompt_tokens} (cached {usage.cached_tokens}) new={usage.completion_tokens}")


def show_error(error: grpc.RpcError) -> None:
    """One line: the code, the stable reason where the server gave one, and the message for people."""
    status = rpc_status.from_call(error)  # the details of the call's trailers
    info = error_details_pb2.ErrorInfo()
    found = any(detail.Unpack(info) for detail in (status.details if status else ()))
    reason = f" reason={info.reason} retryable={info.metadata['retryable']}" if found else ""
    print(f"error: {error.code().name}{reason}: {error.details()}")


def chat(stub: InferenceServiceStub, question: str) -> None:
    """Streams an answer."""
    show(stub.Generate(request_for(question), timeout=TIMEOUT_S, metadata=METADATA))


def error(stub: InferenceServiceStub, question: str) -> None:
    """Asks for a model that is not there."""
    request = request_for(question)
    request.model = "no-such-model"
    try:
        show(stub.Generate(request, timeout=TIMEOUT_S, metadata=METADATA))
    except grpc.RpcError as refusal:
        show_error(refusal)


def cancel(stub: InferenceServiceStub, question: str) -> None:
    """Cancels its own call after some tokens; another client would send Cancel with the request's id."""
    call = stub.Generate(request_for(question, max_tokens=2000), timeout=TIMEOUT_S, metadata=METADATA)
    received = 0
    try:
        for event in call:
            received += len(event.delta.token_ids)
            if received >= 5:
                call.cancel()
    except grpc.RpcError as ended:
        print(f"cancelled after {received} tokens: {ended.code().name}")


def resume(stub: InferenceServiceStub, question: str) -> None:
    """Breaks off a stream that was detached from its client, and asks for the rest of it."""
    request = request_for(question)
    request.on_disconnect = pb.ON_DISCONNECT_DETACH
    request.detach_ttl.CopyFrom(Duration(seconds=60))
    call = stub.Generate(request, timeout=TIMEOUT_S, metadata=METADATA)
    cursor = sum(len(event.delta.token_ids) for event in first_delta(call))
    call.cancel()  # as a broken connection would
    print(f"\n-- lost the stream after {cursor} tokens --")
    show(
        stub.Resume(
            pb.ResumeRequest(request_id=request.request_id, cursor=[cursor]), timeout=TIMEOUT_S, metadata=METADATA
        )
    )


def first_delta(call: Iterator[pb.GenerateResponse]) -> Iterator[pb.GenerateResponse]:
    """The events up to the first that has ids, printed."""
    for event in call:
        print(event.delta.text, end="", flush=True)
        yield event
        if event.delta.token_ids:
            return


def models(stub: InferenceServiceStub, _: str) -> None:
    """Lists the models."""
    for model in stub.ListModels(pb.ListModelsRequest(), timeout=TIMEOUT_S, metadata=METADATA).models:
        print(f"{model.id}: context {model.max_model_len}, workers {model.workers}")


COMMANDS: dict[str, Callable[[InferenceServiceStub, str], None]] = {
    "chat": chat,
    "error": error,
    "cancel": cancel,
    "resume": resume,
    "models": models,
}

if __name__ == "__main__":
    sys.exit(main())
