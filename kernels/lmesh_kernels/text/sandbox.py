"""Renders templates in helper processes that can be killed: a template that loops harms nobody but itself."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import struct
import sys
from asyncio.subprocess import PIPE, Process
from typing import Any

from lmesh_kernels.text.template import Messages, TemplateError

_LENGTH = struct.Struct("<I")


class TemplateSandbox:
    """A few processes, each rendering one template at a time within `timeout_s` and `memory_bytes`.

    A process that overruns is killed and replaced by the next call that needs it. Processes are started on demand
    and end with this one, however it ends.
    """

    def __init__(self, *, processes: int = 2, timeout_s: float = 2.0, memory_bytes: int = 512 << 20) -> None:
        self._timeout_s = timeout_s
        self._memory_bytes = memory_bytes
        self._slots: asyncio.Queue[Process | None] = asyncio.Queue()
        for _ in range(processes):
            self._slots.put_nowait(None)
        self._closed = False
        self._ending: set[asyncio.Task[None]] = set()

    async def render(
        self,
        template: str,
        *,
        messages: Messages,
        add_generation_prompt: bool,
        special_tokens: dict[str, str],
        tools: list[dict[str, Any]] | None = None,
        extra: dict[str, Any] | None = None,
    ) -> str:
        """As `template.render`; besides its errors TemplateError TEMPLATE_TIMEOUT when the time is up."""
        job = {
            "template": template,
            "messages": messages,
            "add_generation_prompt": add_generation_prompt,
            "special_tokens": special_tokens,
            "tools": tools,
            "extra": extra,
        }
        return _result(await self._run(json.dumps(job).encode()))

    async def _run(self, frame: bytes) -> dict[str, str]:
        process = await self._slots.get()
        whole = False
        try:
            if process is None or process.returncode is not None:
                process = await self._spawn()
            # Starting is not the template's time: the helper says when it is ready.
            answer = await asyncio.wait_for(_exchange(process, frame), self._timeout_s)
            whole = True
            return dict(json.loads(answer))
        except TimeoutError as error:
            message = f"the chat template did not end within {self._timeout_s:g} s"
            raise TemplateError("TEMPLATE_TIMEOUT", message) from error
        except (EOFError, ConnectionError) as error:
            message = "the process that rendered the chat template ended; most likely it needed too much memory"
            raise TemplateError("TEMPLATE_FAILED", message) from error
        finally:
            # Nothing is awaited here, so that no cancellation can lose the slot. After half an exchange, a
            # cancelled one included, the rest of the answer would be taken for the next caller's.
            keep = whole and not self._closed
            if not keep:
                self._end(process)
            self._slots.put_nowait(process if keep else None)

    async def _spawn(self) -> Process:
        arguments = ["-P", "-m", "lmesh_kernels.text.render_process", str(os.getpid()), str(self._memory_bytes)]
        process = await asyncio.create_subprocess_exec(sys.executable, *arguments, stdin=PIPE, stdout=PIPE)
        assert process.stdout is not None
        try:
            await process.stdout.readexactly(1)
        except BaseException as error:
            self._end(process)
            if isinstance(error, EOFError):
                raise RuntimeError("the process that renders templates did not start") from error
            raise
        return process

    def _end(self, process: Process | None) -> None:
        """Kills a helper at once and leaves the rest to a task of its own."""
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        task = asyncio.create_task(_reap(process))
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    async def close(self) -> None:
        """Ends the idle helpers; one that is rendering ends when it has answered."""
        self._closed = True
        for _ in range(self._slots.qsize()):
            self._end(self._slots.get_nowait())
            self._slots.put_nowait(None)
        await asyncio.gather(*self._ending)


def _result(answer: dict[str, str]) -> str:
    if "reason" in answer:
        raise TemplateError(answer["reason"], answer["message"])
    return answer["text"]


async def _exchange(process: Process, frame: bytes) -> bytes:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(_LENGTH.pack(len(frame)) + frame)
    await process.stdin.drain()
    (length,) = _LENGTH.unpack(await process.stdout.readexactly(4))
    return await process.stdout.readexactly(length)


async def _reap(process: Process) -> None:
    """Waits for a killed helper's end and for its pipes to close."""
    with contextlib.suppress(ConnectionError):
        await process.communicate()
