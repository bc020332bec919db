"""The engine of a simulated worker: steps on virtual time, ids from the oracle, and a process of its own."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from lmesh_worker import messages as m
from lmesh_worker.errors import ENGINE_DIED, EngineFailedError

from tests.chaos.oracle import VOCAB, token
from tests.chaos.virtual_loop import Process, VirtualLoop

MAX_SEQS = 4
MOST_GRANULES = 12
Pace = tuple[float, float]  # least and most seconds of a step
FAST_STEP_S: Pace = (0.01, 0.06)
SLOW_STEP_S: Pace = (0.2, 1.2)
DIED = object()
READY = m.Ready(
    device="sim",
    max_model_len=512,
    vocab_size=VOCAB,
    block_size=16,
    kv_blocks=64,
    max_seqs=MAX_SEQS,
    max_step_tokens=64,
    weights_version=1,
    plan={},
    pid=0,
    kv_format="sim",
    kv_granule_blocks=4,
)


@dataclass(slots=True)
class Running:
    """One sequence in the engine."""

    start: m.Start
    length: int  # ids so far, prompt and all
    first: bool = True

    def next_ids(self, count: int) -> tuple[list[int], m.Finish]:
        start, ids = self.start, []
        for _ in range(count):
            ids.append(token(start.params.seed, start.choice, self.length))
            self.length += 1
            if ids[-1] in start.params.stop_token_ids:
                return ids, m.Finish.STOP
            if self.length - start.prompt_len >= start.params.max_tokens:
                return ids, m.Finish.LENGTH
        return ids, m.Finish.RUNNING


class SimEngine:
    """In place of EngineClient and the process behind it. `on_start` looks at every sequence that begins."""

    def __init__(
        self,
        loop: VirtualLoop,
        process: Process,
        rng: random.Random,
        pace: Pace,
        on_start: Callable[[m.Start], None],
    ) -> None:
        self.process, self._pace = process, pace
        self._loop, self._rng, self._on_start = loop, rng, on_start
        self._commands: asyncio.Queue[m.Command] = asyncio.Queue()
        self._reports: asyncio.Queue[object] = asyncio.Queue()
        self.sequences: dict[int, Running] = {}  # by key, in order of arrival
        self.granules: list[bytes] = []  # of its prefix cache; what they stand for does not matter here
        self._steps = self._generated = self._prompt_tokens = 0

    # -- the server's side

    async def connect(self) -> None:
        """Starts the engine's own process."""
        self._loop.spawn(self.process, self._run())

    def send(self, command: m.Command) -> None:
        """As the pipe: it holds what a stopped engine does not read."""
        self._commands.put_nowait(command)

    @property
    def backlog_bytes(self) -> int:
        """Of the pipe."""
        return 64 * self._commands.qsize()

    async def ready(self, timeout_s: float, on_progress: Callable[[int], None] = lambda progress: None) -> m.Ready:
        """Some time to load."""
        await asyncio.sleep(self._rng.uniform(0.05, 0.5))
        return READY

    async def reports(self) -> AsyncIterator[m.StepReport | m.ProgressChange]:
        """What the engine says; EngineFailedError when it died."""
        while (report := await self._reports.get()) is not DIED:
            yield report  # type: ignore[misc]
        raise EngineFailedError(ENGINE_DIED, "the engine was ended by signal 9")

    async def load_adapter(self, digest: str, folder: str) -> m.AdapterLoaded:
        """Holds whatever it is told to."""
        return m.AdapterLoaded(digest)

    async def stop(self, timeout_s: float) -> None:
        self.kill()

    def kill(self) -> None:
        self.process.alive = False

    # -- faults

    def die(self) -> None:
        """The engine alone is killed: its pipe ends."""
        self.kill()
        self._reports.put_nowait(DIED)

    # -- the engine's side

    async def _run(self) -> None:
        while True:
            if not self.sequences:
                self._take(await self._commands.get())
            while not self._commands.empty():
                self._take(self._commands.get_nowait())
            if self.sequences:
                await asyncio.sleep(self._rng.uniform(*self._pace))
                self._step()

    def _take(self, command: m.Command) -> None:
        if isinstance(command, m.Start):
            self._on_start(command)
            self.sequences[command.key] = Running(command, len(command.ids))
            self._prompt_tokens += command.prompt_len
        elif isinstance(command, m.Abort):
            self.sequences.pop(command.key, None)
            self._report([])

    def _step(self) -> None:
        self._steps += 1
        outputs = []
        for key, running in list(self.sequences.items())[:MAX_SEQS]:
            if running.first and self._rng.random() < 0.3:
                continue  # its prompt takes another step
            start_pos = running.length
            ids, finish = running.next_ids(self._rng.choice((1, 1, 2, 4)))
            outputs.append((key, running, start_pos, ids, finish))
            if finish:
                del self.sequences[key]
        self._report(outputs)

    def _cached(self, sequences: int) -> tuple[bytes, bytes]:
        """Some granules become findable, and some are evicted."""
        added = [self._rng.randbytes(16) for _ in range(sequences) if self._rng.random() < 0.3]
        evicted = [
            self.granules.pop(0) for _ in range(len(self.granules) + len(added) - MOST_GRANULES) if self.granules
        ]
        self.granules += added
        return b"".join(added), b"".join(evicted)

    def _report(self, outputs: list[tuple[int, Running, int, list[int], m.Finish]]) -> None:
        timings = [m.Timing(i, 0, 10, 20, 0) for i, (_, running, *_) in enumerate(outputs) if running.first]
        for _, running, _, ids, _ in outputs:
            running.first = False
            self._generated += len(ids)
        load = m.Load(
            running=min(MAX_SEQS, len(self.sequences)),
            waiting=max(0, len(self.sequences) - MAX_SEQS),
            kv_blocks_used=2 * len(self.sequences),
            steps=self._steps,
            prefix_query_tokens=self._prompt_tokens,
            prefix_hit_tokens=0,
            preemptions=0,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated,
        )
        added, removed = self._cached(len(outputs))
        self._reports.put_nowait(
            m.StepReport(
                kv_added=added,
                kv_removed=removed,
                keys=[key for key, *_ in outputs],
                start_pos=[position for _, _, position, *_ in outputs],
                n_new=[len(ids) for *_, ids, _ in outputs],
                ids=[i for *_, ids, _ in outputs for i in ids],
                finish=[int(finish) for *_, finish in outputs],
                load=load,
                weights_version=1,
                step_us=1000,
                timings=timings,
            )
        )
