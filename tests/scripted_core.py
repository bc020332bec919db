"""A gateway's core that says a script, behind the real HTTP or gRPC server, and its address."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import replace

from lmesh.inference.v1 import inference_pb2_grpc
from lmesh_chassis.server import GrpcServer
from lmesh_gateway.errors import (
    DOMAIN,
    ContextLengthExceededError,
    ModelNotFoundError,
    QueueFullError,
    RequestNotFoundError,
    WorkerLostError,
)
from lmesh_gateway.generation import (
    Accepted,
    ChoiceEnd,
    Delta,
    Event,
    Finish,
    GenerationRequest,
    ServedModel,
    TokenLogprob,
    TokenLogprobs,
    Usage,
)
from lmesh_gateway.http.app import build_app
from lmesh_gateway.http_server import HttpServer, bind
from lmesh_gateway.placement import RequestRecord
from lmesh_gateway.servicer import SERVICE_NAME, InferenceServicer
from lmesh_kernels.text.generation import GenerationDefaults
from lmesh_kernels.text.tokenizer import TextTokenizer

from tests.tiny_model import byte_tokenizer

LIMIT = 4 << 20
WORDS = ("Hello", " wide", " world")


def scores(text: str) -> TokenLogprobs:
    token = TokenLogprob(id=len(text), logprob=-0.5, text=text, raw=text.encode())
    other = TokenLogprob(id=0, logprob=-1.5, text="?", raw=b"?")
    return TokenLogprobs(token=token, top=(token, other))


class ScriptedCore:
    """Says three words a choice; some model names ask for trouble."""

    def __init__(self) -> None:
        self.requests: list[GenerationRequest] = []
        self.cancelled = threading.Event()
        self.ready = True

    async def generate(self, request: GenerationRequest) -> AsyncIterator[Event]:
        self.requests.append(request)
        try:
            async for event in self._events(request):
                yield event
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled.set()
            raise

    async def _events(self, request: GenerationRequest) -> AsyncIterator[Event]:
        if request.model == "full":
            raise QueueFullError("busy", retry_after_ms=1500)
        if request.model == "long":
            raise ContextLengthExceededError("the prompt has 9 tokens", field="text.prompt")
        request_id = request.request_id or "drawn"
        yield Accepted(request_id=request_id, model=request.model, prompt_ids=(1, 2, 3), seed=1, created=12.5)
        if request.model == "endless":
            while True:
                yield Delta(choice=0, text="x", token_ids=(1,))
                await asyncio.sleep(0.01)
        for choice in range(request.sampling.n):
            prompt = (scores("b"), scores("c")) if request.output.prompt_logprobs is not None and choice == 0 else None
            for word in WORDS if request.stops.max_tokens != 0 else ():
                found = None if request.output.logprobs is None else (scores(word),)
                yield Delta(choice=choice, text=word, token_ids=(7,), logprobs=found, prompt_logprobs=prompt)
                prompt = None
            if prompt is not None:
                yield Delta(choice=choice, text="", token_ids=(), prompt_logprobs=prompt)
            if request.model == "lost":
                raise WorkerLostError("the worker is gone")
            yield ChoiceEnd(choice=choice, reason="stop" if choice == 0 else "length")
        count = 3 * request.sampling.n
        yield Finish(choices=(), usage=Usage(prompt_tokens=3, completion_tokens=count, cached_tokens=2))

    def list(self, tenant: str) -> list[ServedModel]:
        return [self.get("m", tenant)]

    def pinned(self, base: str, *, adapter: str, shown: str) -> ServedModel:
        return replace(self.get(base, ""), id=shown, adapter=adapter)

    def get(self, model: str, tenant: str) -> ServedModel:
        if model == "nobody":
            raise ModelNotFoundError("no worker serves 'nobody'", field="model")
        tokenizer = TextTokenizer(
            byte_tokenizer(), special_tokens={"eos_token": "</s>"}, eos_ids=(), chat_template=None, add_bos=False
        )
        return ServedModel(
            id=model,
            base=model,
            digest="d",
            max_model_len=512,
            vocab_size=258,
            created=3.0,
            workers=1,
            tokenizer=tokenizer,
            defaults=GenerationDefaults(),
        )


@contextmanager
def loop_thread() -> Iterator[asyncio.AbstractEventLoop]:
    """An event loop of its own in a thread, so that a test may call it as another process would."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@contextmanager
def served() -> Iterator[tuple[str, ScriptedCore]]:
    """A running HTTP server's URL and its core."""
    core = ScriptedCore()
    app = build_app(core, core, max_body_bytes=LIMIT, ready=lambda: core.ready)
    server = HttpServer(app, bind("127.0.0.1:0", reuse_port=False), drain_timeout_s=1)
    with loop_thread() as loop:
        asyncio.run_coroutine_threadsafe(server.start(), loop).result(10)
        yield f"http://127.0.0.1:{server.port}", core
        asyncio.run_coroutine_threadsafe(server.drain(), loop).result(10)


class NoRecords:
    """A mesh without a scheduler: nothing is found."""

    async def cancel(self, request_id: str, tenant: str) -> None:
        raise RequestNotFoundError(f"no request {request_id}")

    async def describe(self, request_id: str, tenant: str) -> RequestRecord:
        raise RequestNotFoundError(f"no request {request_id}")


@contextmanager
def served_grpc() -> Iterator[tuple[str, ScriptedCore]]:
    """A running gRPC server's address and its core."""
    core = ScriptedCore()
    with loop_thread() as loop:

        async def start() -> tuple[GrpcServer, int]:
            server = GrpcServer("127.0.0.1:0", domain=DOMAIN)
            servicer = InferenceServicer(core, core, NoRecords())
            server.add(inference_pb2_grpc.add_InferenceServiceServicer_to_server, servicer, SERVICE_NAME)
            return server, await server.start()

        server, port = asyncio.run_coroutine_threadsafe(start(), loop).result(10)
        yield f"127.0.0.1:{port}", core
        asyncio.run_coroutine_threadsafe(server.drain(0), loop).result(10)
