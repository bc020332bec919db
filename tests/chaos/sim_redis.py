"""Redis as simulated processes see it: a real server behind a link of virtual time, which can be away or lose all.

Commands run in a real server, because the scripts are real Lua; each round trip is a blocking one at its virtual time.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

import redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

ROUND_TRIP_S = 0.001
TIMEOUT_S = 2.0


class SimStore:
    """The one server of a simulation. `away` makes every command fail, half of them after they were done."""

    def __init__(self, client: redis.Redis, rng: random.Random) -> None:
        self.client, self._rng = client, rng
        self.away = False
        self.calls = 0
        self.lose_all()

    def lose_all(self) -> None:
        """As after a kill: it keeps nothing on disk, and forgets its scripts."""
        self.client.flushall()
        self.client.script_flush()

    async def run(self, command: Callable[[], Any]) -> Any:
        """One round trip."""
        await asyncio.sleep(self._rng.uniform(0.2, 1.0) * ROUND_TRIP_S)
        if self.away:
            return await self._fail()
        self.calls += 1
        answer = command()
        await asyncio.sleep(self._rng.uniform(0.2, 1.0) * ROUND_TRIP_S)
        if self.away:
            return await self._fail()  # done, and the answer is lost
        return answer

    async def _fail(self) -> Any:
        if self._rng.random() < 0.5:
            raise RedisConnectionError("the server closed the connection")
        await asyncio.sleep(TIMEOUT_S)
        raise RedisTimeoutError("timeout reading from the server")


class SimRedis:
    """In place of redis.asyncio.Redis."""

    def __init__(self, store: SimStore) -> None:
        self._store = store

    def pipeline(self, transaction: bool = True) -> SimPipeline:
        return SimPipeline(self._store, transaction)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        command = getattr(self._store.client, name)

        async def call(*args: Any, **options: Any) -> Any:
            return await self._store.run(lambda: command(*args, **options))

        return call

    async def aclose(self) -> None:
        pass


class SimPipeline:
    """In place of redis.asyncio's pipeline."""

    def __init__(self, store: SimStore, transaction: bool) -> None:
        self._store, self._transaction = store, transaction
        self._commands: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    async def __aenter__(self) -> SimPipeline:
        return self

    async def __aexit__(self, *error: object) -> None:
        self._commands.clear()

    def __len__(self) -> int:
        return len(self._commands)

    def __getattr__(self, name: str) -> Callable[..., SimPipeline]:
        def put(*args: Any, **options: Any) -> SimPipeline:
            self._commands.append((name, args, options))
            return self

        return put

    async def execute(self, raise_on_error: bool = True) -> Any:
        commands, self._commands = self._commands, []
        return await self._store.run(lambda: self._execute(commands, raise_on_error))

    def _execute(self, commands: list[tuple[str, tuple[Any, ...], dict[str, Any]]], raise_on_error: bool) -> Any:
        with self._store.client.pipeline(transaction=self._transaction) as pipe:
            for name, args, options in commands:
                getattr(pipe, name)(*args, **options)
            return pipe.execute(raise_on_error=raise_on_error)
