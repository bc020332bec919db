"""Lua scripts in Redis: one round trip a batch, loaded again when a restarted Redis has forgotten them."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha1
from typing import Any, NamedTuple

from redis.asyncio import Redis
from redis.exceptions import NoScriptError

PREFIX = "lmesh:"
INCARNATION_KEY = f"{PREFIX}incarnation"  # has no TTL: it must only ever grow

FENCED = -1
# Begins every script: KEYS[1] is the incarnation's key, ARGV[1] the writer's incarnation. A newer scheduler fences the
# writer off; a key that is behind (an empty Redis) is set right, so that it fences the older ones.
FENCE = """
local mine, newest = tonumber(ARGV[1]), tonumber(redis.call('GET', KEYS[1]) or 0)
if newest > mine then return -1 end
if newest < mine then redis.call('SET', KEYS[1], ARGV[1]) end
"""

# An empty Redis must not make incarnations begin anew, so they are never behind its clock's seconds.
_NEXT = """
local newest = tonumber(redis.call('GET', KEYS[1]) or 0)
local fresh = math.max(newest + 1, tonumber(redis.call('TIME')[1]))
redis.call('SET', KEYS[1], string.format('%.0f', fresh))
return fresh
"""


class FencedError(RuntimeError):
    """A newer scheduler has taken over; this one must stop."""


class Script:
    """A script by its digest."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.sha = sha1(text.encode(), usedforsecurity=False).hexdigest()


class Call(NamedTuple):
    """A script with its keys and arguments."""

    script: Script
    keys: Sequence[str]
    arguments: Sequence[str | int | bytes]


NEXT_INCARNATION = Script(_NEXT)


async def run(redis: Redis, calls: Sequence[Call]) -> list[int]:
    """Runs the calls in order in one round trip; all must bear repetition.

    Raises FencedError when a newer scheduler has taken over, RedisError or OSError when Redis does not do as told.
    """
    answers = await _execute(redis, calls)
    if any(isinstance(answer, NoScriptError) for answer in answers):
        for script in {call.script for call in calls}:
            await redis.script_load(script.text)
        answers = await _execute(redis, calls)
    if FENCED in answers:
        raise FencedError("a newer scheduler has taken over")
    for answer in answers:
        if isinstance(answer, Exception):
            raise answer
    return answers


async def _execute(redis: Redis, calls: Sequence[Call]) -> list[Any]:
    async with redis.pipeline(transaction=False) as pipe:
        for call in calls:
            pipe.evalsha(call.script.sha, len(call.keys), *call.keys, *call.arguments)
        return await pipe.execute(raise_on_error=False)


async def next_incarnation(redis: Redis) -> int:
    """A number larger than any scheduler of this mesh had before. Raises RedisError or OSError."""
    return (await run(redis, [Call(NEXT_INCARNATION, [INCARNATION_KEY], [])]))[0]
