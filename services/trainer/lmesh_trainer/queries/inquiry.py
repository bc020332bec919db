"""One question put to one process, torch-free."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from pathlib import Path

import msgspec

from lmesh_trainer.queries.questions import QUESTION_FILE, REPLY_FILE, Question, Refused, Reply

_MODULE = "lmesh_trainer.queries.process"


async def inquire(question: Question, folder: Path, *, timeout_s: float) -> Reply:
    """The answer, or Refused QUERY_TIMEOUT or QUERY_DIED; `folder` is this question's own. Cancelling kills it."""
    (folder / QUESTION_FILE).write_bytes(msgspec.msgpack.encode(question))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", _MODULE, "--folder", str(folder)),
        stdin=asyncio.subprocess.DEVNULL,
        start_new_session=True,
        env={**os.environ, "LMESH_DIE_WITH_PARENT": str(os.getpid())},
    )
    try:
        async with asyncio.timeout(timeout_s):
            await process.wait()
    except TimeoutError:
        return Refused(reason="QUERY_TIMEOUT", message=f"no answer within {timeout_s:g} s")
    finally:
        await _kill(process)
    return await asyncio.to_thread(_reply, folder)


async def _kill(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    await process.wait()


def _reply(folder: Path) -> Reply:
    try:
        reply: Reply = msgspec.msgpack.decode((folder / REPLY_FILE).read_bytes(), type=Reply)
    except (OSError, msgspec.DecodeError):
        return Refused(reason="QUERY_DIED", message="the process that was asked died without an answer")
    return reply
