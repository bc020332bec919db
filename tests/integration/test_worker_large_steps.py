"""A step too large for one message: its prompt scores arrive whole, and the link and its others live on."""

from __future__ import annotations

from tests.scripted_engine import VOCAB
from tests.worker_process import LENGTH, running_worker, start

PROMPT = 500


async def test_prompt_scores_beyond_a_messages_limit() -> None:
    slots = range(1, 5)
    async with running_worker() as running:
        gateway = await running.attached()
        ids, params = list(range(PROMPT)), {"prompt_logprobs": VOCAB}
        await gateway.start(
            *(start(slot, "score", ids=ids, max_tokens=2, params=params) for slot in slots),
            start(9, "count", max_tokens=200),
        )
        chosen: dict[int, list[float]] = {slot: [] for slot in slots}
        tops: dict[int, list[int]] = {slot: [] for slot in slots}
        total = largest = 0
        while not all(gateway.received[slot, 100 + slot].finish for slot in (*slots, 9)):
            outputs = await gateway.read()
            assert outputs is not None
            total, largest = total + outputs.ByteSize(), max(largest, outputs.ByteSize())
            for scores in outputs.logprobs:
                assert scores.prompt
                chosen[outputs.slot[scores.entry]] += scores.chosen
                tops[outputs.slot[scores.entry]] += scores.top_ids
            await gateway.ack(outputs.step_seq)
    assert total > len(slots) * PROMPT * VOCAB * 5, "it was meant to be much"
    assert largest < 2 * 2**20
    assert gateway.step_seqs == list(range(1, len(gateway.step_seqs) + 1))
    for slot in slots:
        assert chosen[slot] == [float(-place) for place in range(1, PROMPT)]
        assert tops[slot] == list(range(VOCAB)) * (PROMPT - 1)
        received = gateway.received[slot, 100 + slot]
        assert (received.finish, len(received.ids), received.timing.cached_tokens) == (LENGTH, 2, 4)
    assert gateway.received[9, 109].ids == [(4 + i) % VOCAB for i in range(200)]
