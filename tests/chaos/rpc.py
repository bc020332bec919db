"""gRPC's faces over the simulated network: what generated stubs call, and what servicers are called with."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc
from grpc.aio import AioRpcError, Metadata
from lmesh_chassis.errors import ServiceError, to_status

from tests.chaos.virtual_loop import PROCESS, Process
from tests.chaos.wires import CANCEL, END, WINDOW, Inbox, Item, Net, Status, Stream

OK = Status(grpc.StatusCode.OK)
BROKEN = Status(grpc.StatusCode.UNAVAILABLE, "the connection broke")
REFUSED = Status(grpc.StatusCode.UNAVAILABLE, "connection refused")
LEFT = Status(grpc.StatusCode.CANCELLED, "cancelled")
LATE = Status(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded")


class Gate:
    """Holds a writer back while its reader is too far behind."""

    def __init__(self) -> None:
        self._waiter: asyncio.Future[None] | None = None

    async def passed(self, backlog: Callable[[], int]) -> None:
        await asyncio.sleep(0)
        while backlog() >= WINDOW:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter

    def open(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class SimCall:
    """The client's end; as grpc.aio's calls as far as the mesh uses them."""

    def __init__(self, net: Net, address: str, path: str, serialize: Any, deserialize: Any, options: Any) -> None:
        process = PROCESS.get()
        assert process is not None, "only processes call"
        self._net, self._serialize, self._deserialize = net, serialize, deserialize
        self._gate, self._space = Gate(), Gate()
        self._inbox = Inbox(self._space.open)
        self._status: Status | None = None
        self._ended = net.loop.create_future()
        self._closed = False
        self._server: ServerCall | None = None
        found = net.listener(address)
        # A stream to nowhere: the refusal travels, and so takes its time.
        self._stream = net.open(process, found[0] if found else Process("nobody", 0))
        self._stream.at_client = self._take
        timeout, metadata = options.get("timeout"), tuple(options.get("metadata") or ())
        if found is None:
            self._stream.at_server = lambda item: None
            self._stream.down.break_off(REFUSED, net.delay_s())
            self._stream.up.cut = True
            net.forget(self._stream)
        else:
            gates = (self._gate, self._space)
            self._server = ServerCall(net, self._stream, self._inbox, found[1], path, timeout, metadata, gates)
        if timeout is not None:
            net.loop.call_later(timeout, self._end, LATE)

    def _take(self, item: Item) -> None:
        if (isinstance(item, Status) and item.code is not grpc.StatusCode.OK) or self._status is None:
            self._inbox.put(item)

    def _end(self, status: Status) -> None:
        if self._status is None:
            self._status = status
            self._ended.set_result(None)
            if status in (LEFT, LATE):
                self._stream.up.send(CANCEL)
                self._stream.down.cut = True
            self._net.forget(self._stream)
            self._inbox.put(status)
            self._gate.open()

    async def write(self, message: Any) -> None:
        if self._status is not None or self._closed:
            raise asyncio.InvalidStateError("the call has ended")
        self._stream.up.send(self._serialize(message))
        await self._gate.passed(self._backlog)

    def _backlog(self) -> int:
        unread = 0 if self._server is None else len(self._server.inbox)
        return 0 if self._status is not None or self._stream.up.cut else len(self._stream.up) + unread

    async def done_writing(self) -> None:
        if not self._closed:
            self._closed = True
            self._stream.up.send(END)

    async def read(self) -> Any:
        if self._status is None:
            item = await self._inbox.get()
            if not isinstance(item, Status):
                return self._deserialize(item)
            self._end(item)
        return self._raise_for_status()

    def _raise_for_status(self) -> Any:
        status = self._status
        assert status is not None
        if status is LEFT:
            raise asyncio.CancelledError
        if status.code is not grpc.StatusCode.OK:
            raise AioRpcError(status.code, Metadata(), Metadata(*status.trailers), status.details)
        return grpc.aio.EOF

    def cancel(self) -> bool:
        self._end(LEFT)
        return True

    def done(self) -> bool:
        return self._status is not None

    def cancelled(self) -> bool:
        return self._status is LEFT

    async def code(self) -> grpc.StatusCode:
        await self._ended
        assert self._status is not None
        return self._status.code

    async def details(self) -> str:
        await self._ended
        return self._status.details if self._status else ""

    async def initial_metadata(self) -> Metadata:
        return Metadata()

    async def trailing_metadata(self) -> Metadata:
        await self._ended
        return Metadata(*(self._status.trailers if self._status else ()))

    async def __aiter__(self) -> Any:
        while (message := await self.read()) is not grpc.aio.EOF:
            yield message

    async def answer(self, request: Any) -> Any:
        """A call of one message each way."""
        self._stream.up.send(self._serialize(request))
        await self.done_writing()
        message = await self.read()
        while not self.done():
            await self.read()
        return message

    def ask(self, request: Any) -> SimCall:
        """A call of one message up."""
        self._stream.up.send(self._serialize(request))
        self._closed = True
        self._stream.up.send(END)
        return self


class ServerCall:
    """The server's end: starts the handler when the stream arrives, cancels it when the client is gone."""

    def __init__(
        self,
        net: Net,
        stream: Stream,
        outbox: Inbox,
        server: Any,
        path: str,
        timeout: float | None,
        metadata: Any,
        gates: tuple[Gate, Gate],
    ) -> None:
        self._net, self._stream, self._server, self._path = net, stream, server, path
        self._unread = outbox  # at the client
        self.metadata = metadata
        self._deadline = None if timeout is None else net.loop.now + timeout
        self._task: asyncio.Task[None] | None = None
        client_gate, client_space = gates
        self._gate = client_space  # opened when the client reads
        self.inbox = Inbox(client_gate.open)
        self.gone = False
        stream.at_server = self._take
        stream.up.send(None)  # the stream itself: it may arrive when nobody listens any more

    def _take(self, item: Item) -> None:
        if item is None:
            self._begin()
        elif item is CANCEL:
            self.gone = True
            self._gate.open()
            if self._task is not None:
                self._net.loop.call_soon(self._task.cancel, context=self._stream.server.context)
        else:
            self.inbox.put(item)

    def _begin(self) -> None:
        process = self._stream.server
        if not process.alive or self._path not in self._server.handlers or self._server.stopped:
            self._stream.down.send(REFUSED)
            return
        handler = self._server.handlers[self._path]
        self._task = self._net.loop.spawn(process, self._run(handler))
        self._server.calls[self] = self._task

    async def _run(self, handler: Any) -> None:
        status = OK
        try:
            await self._serve(handler)
        except ServiceError as error:
            told = to_status(error, self._server.domain)
            status = Status(told.code, told.details, tuple(told.trailing_metadata))
        except asyncio.CancelledError:
            status = Status(grpc.StatusCode.UNAVAILABLE, "the server leaves")
        except Exception as error:
            self._net.loop.failures.append(f"{self._path}: {error!r}")
            status = Status(grpc.StatusCode.INTERNAL, repr(error))
        finally:
            self._server.calls.pop(self, None)
        self.gone = True
        self._stream.down.send(status)

    async def _serve(self, handler: Any) -> None:
        behaviour = handler.stream_stream or handler.unary_stream or handler.unary_unary or handler.stream_unary
        context = ServerContext(self, handler)
        first = context if handler.request_streaming else await context.read()
        outcome = behaviour(first, context)
        if hasattr(outcome, "__aiter__"):
            async for message in outcome:
                await context.write(message)
        elif (message := await outcome) is not None:
            await context.write(message)

    async def send(self, data: bytes) -> None:
        if self.gone:
            await asyncio.get_running_loop().create_future()  # its cancellation is under way
        self._stream.down.send(data)
        await self._gate.passed(self._backlog)

    def _backlog(self) -> int:
        return 0 if self.gone or self._stream.down.cut else len(self._stream.down) + len(self._unread)

    @property
    def client(self) -> str:
        return self._stream.client.name

    def remaining_s(self) -> float | None:
        return None if self._deadline is None else max(0.0, self._deadline - self._net.loop.now)

    def stop(self) -> None:
        """Cancels the handler; the client hears UNAVAILABLE."""
        if self._task is not None:
            self._task.cancel()


class ServerContext:
    """What a servicer gets."""

    def __init__(self, call: ServerCall, handler: Any) -> None:
        self._call, self._handler = call, handler

    async def read(self) -> Any:
        item = await self._call.inbox.get()
        return grpc.aio.EOF if item is END else self._handler.request_deserializer(item)

    async def write(self, message: Any) -> None:
        await self._call.send(self._handler.response_serializer(message))

    def time_remaining(self) -> float | None:
        return self._call.remaining_s()

    def invocation_metadata(self) -> tuple[tuple[str, Any], ...]:
        return self._call.metadata

    def peer(self) -> str:
        return f"sim:{self._call.client}"

    def cancelled(self) -> bool:
        return self._call.gone

    def done(self) -> bool:
        return self._call.gone

    async def send_initial_metadata(self, metadata: Any) -> None:
        pass

    def set_trailing_metadata(self, metadata: Any) -> None:
        pass


class SimChannel:
    """What stubs are made of."""

    def __init__(self, net: Net, address: str) -> None:
        self._net, self._address = net, address

    def _call(self, path: str, serialize: Any, deserialize: Any, options: Any) -> SimCall:
        return SimCall(self._net, self._address, path, serialize, deserialize, options)

    def stream_stream(self, path: str, request_serializer: Any, response_deserializer: Any, **_: Any) -> Any:
        return lambda *_, **options: self._call(path, request_serializer, response_deserializer, options)

    def unary_stream(self, path: str, request_serializer: Any, response_deserializer: Any, **_: Any) -> Any:
        return lambda request, **options: self._call(path, request_serializer, response_deserializer, options).ask(
            request
        )

    def unary_unary(self, path: str, request_serializer: Any, response_deserializer: Any, **_: Any) -> Any:
        return lambda request, **options: self._call(path, request_serializer, response_deserializer, options).answer(
            request
        )

    stream_unary = stream_stream

    async def close(self, grace: Any = None) -> None:
        pass

    async def __aenter__(self) -> SimChannel:
        return self

    async def __aexit__(self, *error: object) -> None:
        pass


class SimServer:
    """In place of lmesh_chassis.server.GrpcServer."""

    def __init__(self, net: Net, address: str, *, domain: str, **_: Any) -> None:
        process = PROCESS.get()
        assert process is not None, "only processes listen"
        self._net, self._address, self._process = net, address, process
        self.domain = domain
        self.handlers: dict[str, Any] = {}
        self.calls: dict[ServerCall, asyncio.Task[None]] = {}
        self.stopped = False
        self.port = int(address.rpartition(":")[2])
        self._serving = False

    def add(self, adder: Callable[[Any, Any], None], servicer: object, service_full_name: str) -> None:
        adder(servicer, _Registrar(self.handlers))

    async def start(self) -> int:
        self._net.bind(self._address, self._process, self)
        return self.port

    def set_serving(self, name: str, serving: bool) -> None:
        self._serving = serving

    def set_all_serving(self, serving: bool) -> None:
        self._serving = serving

    def stop_serving(self) -> None:
        self._serving = False

    def serving(self, name: str = "") -> bool:
        return self._serving

    async def drain(self, timeout_s: float) -> None:
        self.stopped = True
        self._net.unbind(self._address, self._process)
        tasks = list(self.calls.values())
        if tasks and timeout_s > 0:
            await asyncio.wait(tasks, timeout=timeout_s)
        for call in list(self.calls):
            call.stop()
        if tasks:
            await asyncio.wait(tasks)


class _Registrar:
    def __init__(self, handlers: dict[str, Any]) -> None:
        self._handlers = handlers

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        for handler in handlers:
            self._handlers.update(getattr(handler, "_method_handlers", {}))

    def add_registered_method_handlers(self, service: str, handlers: Any) -> None:
        self._handlers.update({f"/{service}/{name}": handler for name, handler in handlers.items()})
