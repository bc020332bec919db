"""The ledger's Lua scripts: fenced by the owner's epoch, each bears repetition, one round trip for a flush."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha1
from typing import Any, NamedTuple

from redis.asyncio import Redis
from redis.exceptions import NoScriptError

FENCED, WHOLE_NEEDED = -1, -2

# KEYS: the record, then each choice's ids.
# ARGV: nonce, created, epoch, gateway, TTL in ms, plan, prompt ids, request's end, then for each choice: how many bytes
# come before, the bytes, its end. With a plan the record is written whole, and the bytes are all that there are.
# Returns 1; -1 when the id is a later request's, or another gateway has taken this one over; -2 when the record is not
# there or does not have what comes before, as after a Redis that lost its memory: then the whole is needed.
_WRITE = """
local nonce, created, epoch, whole = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[6] ~= ''
local held = redis.call('HMGET', KEYS[1], 'nonce', 'created', 'epoch')
if held[1] and held[1] ~= nonce and tonumber(held[2]) >= created then return -1 end
if held[1] == nonce and tonumber(held[3]) > epoch then return -1 end
if not whole then
  if held[1] ~= nonce then return -2 end
  for i = 2, #KEYS do
    local at = 9 + 3 * (i - 2)
    local length, before = redis.call('STRLEN', KEYS[i]), tonumber(ARGV[at])
    if length < before or length > before + #ARGV[at + 1] then return -2 end
  end
else
  redis.call('DEL', unpack(KEYS))
  redis.call('HSET', KEYS[1], 'nonce', nonce, 'created', ARGV[2], 'plan', ARGV[6], 'prompt', ARGV[7],
    'n', #KEYS - 1)
end
redis.call('HSET', KEYS[1], 'epoch', ARGV[3], 'gateway', ARGV[4])
if ARGV[8] ~= '' then redis.call('HSET', KEYS[1], 'end', ARGV[8]) end
for i = 2, #KEYS do
  local at = 9 + 3 * (i - 2)
  local known = redis.call('STRLEN', KEYS[i]) - tonumber(ARGV[at])
  if #ARGV[at + 1] > known then redis.call('APPEND', KEYS[i], string.sub(ARGV[at + 1], known + 1)) end
  if ARGV[at + 2] ~= '' then redis.call('HSET', KEYS[1], 'end:' .. (i - 2), ARGV[at + 2]) end
  redis.call('PEXPIRE', KEYS[i], ARGV[5])
end
redis.call('PEXPIRE', KEYS[1], ARGV[5])
return 1
"""

# KEYS: the record. ARGV: nonce, the epoch that it was read with, the new one, the gateway that claims, TTL in ms.
# Returns 1 when it is that gateway's (also when an earlier call did it and the answer was lost), else 0.
_CLAIM = """
local held = redis.call('HMGET', KEYS[1], 'nonce', 'epoch', 'gateway', 'end')
if held[1] ~= ARGV[1] or held[4] then return 0 end
if held[2] == ARGV[3] and held[3] == ARGV[4] then return 1 end
if held[2] ~= ARGV[2] then return 0 end
redis.call('HSET', KEYS[1], 'epoch', ARGV[3], 'gateway', ARGV[4])
redis.call('PEXPIRE', KEYS[1], ARGV[5])
return 1
"""


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


WRITE, CLAIM = Script(_WRITE), Script(_CLAIM)


async def run(redis: Redis, calls: Sequence[Call]) -> list[int]:
    """Runs the calls in order in one round trip. Raises RedisError or OSError when Redis does not do as told."""
    answers = await _execute(redis, calls)
    if any(isinstance(answer, NoScriptError) for answer in answers):
        for script in {call.script for call in calls}:
            await redis.script_load(script.text)
        answers = await _execute(redis, calls)
    for answer in answers:
        if isinstance(answer, Exception):
            raise answer
    return answers


async def _execute(redis: Redis, calls: Sequence[Call]) -> list[Any]:
    async with redis.pipeline(transaction=False) as pipe:
        for call in calls:
            pipe.evalsha(call.script.sha, len(call.keys), *call.keys, *call.arguments)
        return await pipe.execute(raise_on_error=False)
