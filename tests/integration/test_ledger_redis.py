"""The ledger on a real Redis: who may write, what survives its losses, and what bounds the wait for it."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from lmesh_gateway.errors import LedgerDisabledError, LedgerUnavailableError
from lmesh_gateway.generation import ChoiceEnd, ServedModel, Usage
from lmesh_gateway.ledger import Ledger, LedgerLimits
from lmesh_gateway.ledger_entry import LedgerEntry, Standing
from lmesh_gateway.ledger_record import FailedEnd, Record, choice_key, record_key
from lmesh_gateway.plan import Plan, SequenceParams
from lmesh_kernels.text.generation import GenerationDefaults
from lmesh_kernels.text.tokenizer import TextTokenizer

from tests.redis_server import RedisServer, running_redis
from tests.tiny_model import byte_tokenizer

LIMITS = LedgerLimits(ttl_s=60.0, max_entries=100, max_bytes=1 << 20, timeout_s=0.3)
MODEL = ServedModel(
    id="m",
    base="m",
    digest="d",
    max_model_len=512,
    vocab_size=258,
    created=0.0,
    workers=1,
    tokenizer=TextTokenizer(byte_tokenizer(), special_tokens={}, eos_ids=(), chat_template=None, add_bos=False),
    defaults=GenerationDefaults(temperature=None, top_p=None, top_k=None, max_new_tokens=None),
    longest_token_bytes=8,
)
USAGE = Usage(prompt_tokens=3, completion_tokens=4, cached_tokens=0)


def plan(request_id: str = "r", n: int = 2, **more: Any) -> Plan:
    now = time.monotonic()
    params = SequenceParams(
        temperature=0.7,
        top_p=0.9,
        top_k=5,
        seed=2**63 - 1,
        max_tokens=40,
        stop_token_ids=(257, 3),
        logprobs=-1,
        prompt_logprobs=-1,
        min_p=0.05,
        repetition_penalty=1.1,
        presence_penalty=-0.5,
        frequency_penalty=0.25,
        logit_bias=((7, -100.0), (9, 1.5)),
    )
    fixed: dict[str, Any] = {
        "request_id": request_id,
        "model": MODEL,
        "prompt_ids": (1, 2, 2**31),
        "params": params,
        "n": n,
        "stop": ("é\n",),
        "keep_special_tokens": True,
        "deadline_at": now + 100,
        "queue_deadline_at": now + 50,
        "tenant": "acme",
        "traceparent": "",
        "created": time.time(),
        "priority": -3,
        "detach_ttl_s": 9.5,
        "sync": True,
    }
    return Plan(**(fixed | more))


@dataclass
class Choice:
    """What a live choice shows the ledger."""

    ids: list[int] = field(default_factory=list)
    end: ChoiceEnd | None = None


class Owner:
    """Hears of an entry, and lets a test wait for it."""

    def __init__(self) -> None:
        self.kept = 0
        self.fenced = self.dropped = False
        self._changed = asyncio.Event()

    def on_kept(self, version: int) -> None:
        self.kept = version
        self._changed.set()

    def on_fenced(self) -> None:
        self.fenced = True
        self._changed.set()

    def on_dropped(self) -> None:
        self.dropped = True
        self._changed.set()

    async def until(self, version: int) -> None:
        async with asyncio.timeout(20):
            while self.kept < version:
                self._changed.clear()
                await self._changed.wait()

    async def until_fenced(self) -> None:
        async with asyncio.timeout(20):
            while not self.fenced:
                self._changed.clear()
                await self._changed.wait()


@pytest.fixture
async def server() -> AsyncIterator[RedisServer]:
    async with running_redis() as running:
        yield running


@pytest.fixture
async def ledgers(server: RedisServer) -> AsyncIterator[tuple[Ledger, Ledger]]:
    pair = Ledger(server.url, "g1", LIMITS), Ledger(server.url, "g2", LIMITS)
    for ledger in pair:
        ledger.start()
    yield pair
    for ledger in pair:
        await ledger.close()


def begun(ledger: Ledger, **more: Any) -> tuple[LedgerEntry, list[Choice], Owner]:
    made, owner = plan(**more), Owner()
    choices = [Choice() for _ in range(made.n)]
    return ledger.open(made, choices, owner), choices, owner


async def read(ledger: Ledger, request_id: str = "r") -> Record:
    record = await ledger.read(request_id)
    assert record is not None
    return record


async def test_what_was_written_is_read_back(ledgers: tuple[Ledger, Ledger]) -> None:
    one, other = ledgers
    entry, choices, owner = begun(one)
    choices[0].ids += [7, 8]
    entry.grown()
    choices[1].ids += [2**32 - 1]
    choices[1].end = ChoiceEnd(choice=1, reason="stop", stop_string="é\n")
    entry.grown()
    await owner.until(entry.ended(USAGE))
    assert entry.kept
    record = await read(other)
    assert (record.ids, record.ends, record.end) == ([[7, 8], [2**32 - 1]], [None, choices[1].end], USAGE)
    assert (record.gateway, record.epoch, record.tenant, record.model) == ("g1", 1, "acme", "m")
    restored = record.restore(MODEL, queue_timeout_s=5.0, cache_salt="salt")
    for name in ("params", "prompt_ids", "n", "stop", "keep_special_tokens", "priority", "detach_ttl_s", "sync"):
        assert getattr(restored, name) == getattr(entry.plan, name), name
    assert abs(restored.deadline_at - entry.plan.deadline_at) < 5 and restored.cache_salt == "salt"


async def test_what_nobody_waits_for_is_gathered(
    ledgers: tuple[Ledger, Ledger], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmesh_gateway.ledger._GATHER_S", 3600.0)
    one, other = ledgers
    entry, choices, owner = begun(one, sync=False)
    choices[0].ids += [7]
    entry.grown()
    await asyncio.sleep(0.1)
    assert owner.kept == 0 and await other.read("r") is None
    await one.settled("r")  # a Resume waits
    assert (await read(other)).ids == [[7], []]
    choices[0].ids += [8]
    entry.grown()
    await owner.until(entry.ended(USAGE))  # a client waits for its Finish
    assert (await read(other)).ids == [[7, 8], []]
    waiting, ids, heard = begun(one, request_id="s", sync=True)
    ids[0].ids += [9]
    await heard.until(waiting.grown())  # a client waits for its ids
    assert (await read(other, "s")).ids == [[9], []]


async def test_keys_expire(ledgers: tuple[Ledger, Ledger], server: RedisServer) -> None:
    entry, choices, owner = begun(ledgers[0])
    choices[0].ids += [1]
    await owner.until(entry.grown())
    async with server.client() as client:
        for key in (record_key("r"), choice_key("r", 0)):
            assert 0 < await client.pttl(key) <= LIMITS.ttl_s * 1000


async def test_the_earlier_owner_is_fenced(ledgers: tuple[Ledger, Ledger]) -> None:
    one, other = ledgers
    entry, choices, owner = begun(one)
    choices[0].ids += [7]
    await owner.until(entry.grown())
    claimed = await other.claim(await read(other))
    assert claimed is not None and (claimed.epoch, claimed.gateway) == (2, "g2")
    choices[0].ids += [8]
    entry.grown()
    await owner.until_fenced()
    assert entry.standing is Standing.FENCED and not entry.kept
    assert (await read(one)).ids == [[7], []]
    mine, heard = [Choice([7, 9]), Choice()], Owner()
    goes_on = other.go_on(plan(), mine, heard, nonce=claimed.nonce, epoch=claimed.epoch)
    mine[0].ids += [10]
    await heard.until(goes_on.grown())
    assert (await read(one)).epoch == 2


async def test_of_two_claims_one_wins(ledgers: tuple[Ledger, Ledger]) -> None:
    one, other = ledgers
    entry, _, owner = begun(one)
    await owner.until(entry.version)
    record = await read(one)
    answers = await asyncio.gather(one.claim(record), other.claim(record))
    assert [answer is not None for answer in answers].count(True) == 1
    winner = one if answers[0] else other
    assert await winner.claim(record) is not None  # said again: its answer may have been lost


async def test_an_ended_request_is_not_claimed(ledgers: tuple[Ledger, Ledger]) -> None:
    entry, _, owner = begun(ledgers[0])
    await owner.until(entry.ended(FailedEnd(reason="WORKER_LOST", message="gone")))
    record = await read(ledgers[1])
    assert await ledgers[1].claim(record) is None
    assert isinstance(record.end, FailedEnd)
    assert (record.end.error().reason, record.end.error().message) == ("WORKER_LOST", "gone")


async def test_a_later_request_of_the_id_replaces_it(ledgers: tuple[Ledger, Ledger]) -> None:
    older, choices, old_owner = begun(ledgers[0])
    choices[0].ids += [7, 8, 9]
    await old_owner.until(older.grown())
    newer, _, new_owner = begun(ledgers[1], n=1, created=time.time() + 1)
    await new_owner.until(newer.version)
    assert (await read(ledgers[0])).ids == [[]]
    older.grown()
    await old_owner.until_fenced()


async def test_a_redis_that_lost_its_memory_gets_all_of_it_again(
    ledgers: tuple[Ledger, Ledger], server: RedisServer
) -> None:
    entry, choices, owner = begun(ledgers[0])
    choices[0].ids += [7, 8]
    await owner.until(entry.grown())
    await server.kill()
    choices[0].ids += [9]
    version = entry.grown()
    with pytest.raises(LedgerUnavailableError):
        await ledgers[1].read("r")
    assert not entry.kept
    await server.start()
    await owner.until(version)
    assert (await read(ledgers[1])).ids == [[7, 8, 9], []]


async def test_a_redis_that_stops_is_caught_up_with(ledgers: tuple[Ledger, Ledger], server: RedisServer) -> None:
    entry, choices, owner = begun(ledgers[0])
    await owner.until(entry.version)
    server.signal(signal.SIGSTOP)
    for i in range(50):
        choices[0].ids += [i]
        entry.grown()
        await asyncio.sleep(0)
    assert owner.kept < entry.version and ledgers[0].enabled
    server.signal(signal.SIGCONT)
    await owner.until(entry.version)
    assert (await read(ledgers[1])).ids == [list(range(50)), []]  # though a write was done whose answer came too late


async def test_what_waits_is_bounded(server: RedisServer) -> None:
    await server.kill()
    limits = LedgerLimits(ttl_s=60.0, max_entries=3, max_bytes=1 << 20, timeout_s=0.3)
    ledger = Ledger(server.url, "g", limits)
    begun_ones = [begun(ledger, request_id=f"r{i}") for i in range(5)]
    assert [owner.dropped for _, _, owner in begun_ones] == [True, True, False, False, False]
    entry, choices, owner = begun_ones[-1]
    choices[0].ids += [1] * (limits.max_bytes // 4)
    entry.grown()
    assert owner.dropped and not entry.kept
    begun_ones[0][0].grown()  # of a dropped one nothing waits any more
    await ledger.close()


async def test_closing_writes_what_is_left(server: RedisServer) -> None:
    ledger = Ledger(server.url, "g", LIMITS)
    ledger.start()
    entry, choices, _ = begun(ledger)
    choices[0].ids += [7]
    entry.ended(USAGE)
    await ledger.close()
    reader = Ledger(server.url, "g2", LIMITS)
    assert (await read(reader)).end == USAGE
    await reader.close()


async def test_without_a_url_nothing_is_kept() -> None:
    ledger = Ledger("", "g", LIMITS)
    ledger.start()
    entry, _, _ = begun(ledger)
    assert (ledger.enabled, entry.kept, entry.standing) == (False, False, Standing.DROPPED)
    with pytest.raises(LedgerDisabledError):
        await ledger.read("r")
    await ledger.close()


async def test_a_record_of_another_make_is_refused(ledgers: tuple[Ledger, Ledger], server: RedisServer) -> None:
    async with server.client() as client:
        await client.hset(record_key("r"), mapping={"nonce": "x", "n": "1", "plan": "[]"})
    with pytest.raises(LedgerUnavailableError):
        await ledgers[0].read("r")
