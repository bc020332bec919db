"""Ending tasks, those too that do not hear a cancellation at once."""

from __future__ import annotations

import asyncio

from lmesh_chassis.tasks import end


async def test_tasks_end() -> None:
    async def waits() -> None:
        await asyncio.Event().wait()

    async def fails() -> None:
        raise ValueError("its own")

    async def returns() -> int:
        return 3

    tasks = [asyncio.create_task(waits()), asyncio.create_task(fails()), asyncio.create_task(returns())]
    await asyncio.sleep(0)
    await end(*tasks)
    assert tasks[0].cancelled() and isinstance(tasks[1].exception(), ValueError) and tasks[2].result() == 3
    await end(*tasks)  # nothing is left to do
    await end()


async def test_one_that_swallows_the_first_cancellation() -> None:
    async def deaf() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            await asyncio.Event().wait()

    task = asyncio.create_task(deaf())
    await asyncio.sleep(0)
    async with asyncio.timeout(20):
        await end(task)
    assert task.cancelled()
