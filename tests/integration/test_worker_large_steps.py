"""A step too large for one message: its prompt scores arrive whole, and the link and its others live on."""

from __future__ import annotations

from lmesh_gateway.placement import Leg
from lmesh_gateway.plan import SequenceParams
from lmesh_gateway.run_link import RunLink
from lmesh_gateway.slots import SequenceOutput, SequenceStart

from tests.scripted_engine import VOCAB
from tests.worker_process import LENGTH, running_worker, start, until

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


class Listener:
    """A gateway's request; keeps what comes."""

    def __init__(self) -> None:
        self.outputs: list[SequenceOutput] = []
        self.error: Exception | None = None

    def on_output(self, output: SequenceOutput) -> None:
        self.outputs.append(output)

    def on_lost(self, error: Exception) -> None:
        self.error = error

    @property
    def ended(self) -> bool:
        return self.error is not None or bool(self.outputs and self.outputs[-1].finish)


async def test_a_real_gateways_link_takes_it() -> None:
    """With the limits and acknowledgements that are deployed; in its memory the step is above all bounds."""
    async with running_worker(max_unacked_bytes=8 * 2**20) as running:
        leg = Leg(worker_id="w", epoch=running.epoch, address=running.address, lease=1)
        link = RunLink(leg, "g", grace_s=5, on_gone=lambda link, lost: None)
        listeners = [Listener() for _ in range(5)]
        for i, listener in enumerate(listeners):
            scored = i < 4
            params = SequenceParams(
                temperature=0.0,
                top_p=1.0,
                top_k=0,
                seed=0,
                max_tokens=2 if scored else 300,
                stop_token_ids=(),
                logprobs=-1,
                prompt_logprobs=VOCAB if scored else -1,
            )
            link.start(
                SequenceStart(
                    lease=1,
                    request_id="score" if scored else "count",
                    choice=i,
                    ids=range(PROMPT) if scored else [1],
                    prompt_len=PROMPT if scored else 1,
                    params=params,
                    cache_salt="",
                    traceparent="",
                ),
                listener,
            )
        await until(lambda: all(listener.ended for listener in listeners), timeout_s=60)
        await link.close()
    assert [listener.error for listener in listeners] == [None] * 5
    for listener in listeners[:4]:
        columns = [output.prompt_logprobs for output in listener.outputs if output.prompt_logprobs is not None]
        assert len(columns) > 1
        assert [score for part in columns for score in part.chosen] == [float(-place) for place in range(1, PROMPT)]
        assert [token for output in listener.outputs for token in output.ids] == [PROMPT, PROMPT + 1]
        assert [output.timing is not None for output in listener.outputs].index(True) == 0
    assert len([token for output in listeners[4].outputs for token in output.ids]) == 300
