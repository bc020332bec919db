"""A stand-in for the engine process: speaks the worker's pipe, and does what a request's id says.

`count...` continues with last id + 1, one id a step; `flood...` gives 4096 ids a step without end; `stall...` never
gives anything; `die...` ends the process; `hold...` gives one id and then waits for the abort; `compile...` compiles
until its abort; `score...` gives its prompt's log-probabilities with its first id. `kv+...` makes a granule findable
for each id that it gives, whose hash is that id; `kv-...` evicts them. Source `broken` sends Fatal instead of Ready;
source `slow` never gets ready.
"""

from __future__ import annotations

import argparse
import os
import queue
import signal
import socket
import struct
import threading
import time

import msgspec
from lmesh_worker import messages as m

FLOOD_IDS = 4096
VOCAB = 1000
READY = m.Ready("scripted", 512, VOCAB, 16, 64, 32, 512, 1, {"weights": 1}, os.getpid(), "float32/16/nhd", 4)


class Pipe:
    """Frames over the inherited socket."""

    def __init__(self, fd: int) -> None:
        self._sock = socket.socket(fileno=fd)
        self._decoder = msgspec.msgpack.Decoder(m.Command)

    def send(self, report: m.Report) -> None:
        body = msgspec.msgpack.encode(report)
        self._sock.sendall(struct.pack("<I", len(body)) + body)

    def receive(self) -> bytes | None:
        head = self._exactly(4)
        return None if head is None else self._exactly(struct.unpack("<I", head)[0])

    def _exactly(self, count: int) -> bytes | None:
        data = b""
        while len(data) < count:
            part = self._sock.recv(count - len(data))
            if not part:
                return None
            data += part
        return data

    def commands(self) -> queue.Queue[m.Command]:
        """Filled by a thread; the process ends with the pipe."""
        inbox: queue.Queue[m.Command] = queue.Queue()

        def pump() -> None:
            while (body := self.receive()) is not None:
                inbox.put(self._decoder.decode(body))
            os._exit(0)

        threading.Thread(target=pump, daemon=True).start()
        return inbox


class Sequence:
    """One running sequence."""

    def __init__(self, start: m.Start) -> None:
        self.start = start
        self.ids = list(start.ids)
        self.first = True

    @property
    def produces(self) -> bool:
        kind = self.start.request_id
        return not kind.startswith(("stall", "compile")) and (self.first or not kind.startswith("hold"))

    def step(self) -> tuple[list[int], m.Finish]:
        count = FLOOD_IDS if self.start.request_id.startswith("flood") else 1
        new = [(self.ids[-1] + 1 + i) % VOCAB for i in range(count)]
        self.ids += new
        done = len(self.ids) - self.start.prompt_len >= self.start.params.max_tokens
        return new, m.Finish.LENGTH if done else m.Finish.RUNNING


class ScriptedEngine:
    """Steps over what runs; gauges as a real engine's."""

    def __init__(self, pipe: Pipe) -> None:
        self.pipe = pipe
        self.running: dict[int, Sequence] = {}
        self.steps = self.prompt_tokens = self.generated = 0

    def take(self, command: m.Command) -> bool:
        """False when the engine should leave."""
        if isinstance(command, m.Start):
            if command.request_id.startswith("die"):
                os._exit(3)
            if command.request_id.startswith("compile"):
                self.pipe.send(m.ProgressChange(m.Progress.COMPILING))
            self.running[command.key] = Sequence(command)
            self.prompt_tokens += command.prompt_len
        elif isinstance(command, m.Abort):
            gone = self.running.pop(command.key, None)
            if gone is not None and gone.start.request_id.startswith("compile"):
                self.pipe.send(m.ProgressChange(m.Progress.OK))
            self.pipe.send(self.report([], []))
        return not isinstance(command, m.Shutdown)

    def step(self) -> None:
        batch = {key: sequence for key, sequence in self.running.items() if sequence.produces}
        self.steps += 1
        outputs = [(key, sequence, len(sequence.ids), *sequence.step()) for key, sequence in batch.items()]
        timings = [m.Timing(i, 4, 10, 20, 0) for i, (_, s, *_) in enumerate(outputs) if s.first]
        logprobs = [
            m.Logprobs(i, False, [-0.5] * len(new), 1, new, [-0.5] * len(new))
            for i, (_, s, _, new, _) in enumerate(outputs)
            if s.start.params.logprobs >= 0
        ]
        logprobs += [prompt_scores(i, s.start) for i, (_, s, *_) in enumerate(outputs) if s.first and scores(s)]
        for key, sequence, _, new, finish in outputs:
            sequence.first = False
            self.generated += len(new)
            if finish:
                del self.running[key]
        self.pipe.send(self.report(outputs, timings, logprobs))

    def report(self, outputs: list[tuple], timings: list[m.Timing], logprobs: list[m.Logprobs] = ()) -> m.StepReport:
        load = m.Load(
            running=len(self.running),
            waiting=0,
            kv_blocks_used=2 * len(self.running),
            steps=self.steps,
            prefix_query_tokens=self.prompt_tokens,
            prefix_hit_tokens=4,
            preemptions=0,
            prompt_tokens=self.prompt_tokens,
            generated_tokens=self.generated,
        )
        return m.StepReport(
            keys=[key for key, *_ in outputs],
            start_pos=[pos for _, _, pos, *_ in outputs],
            n_new=[len(new) for *_, new, _ in outputs],
            ids=[token for *_, new, _ in outputs for token in new],
            finish=[int(finish) for *_, finish in outputs],
            load=load,
            weights_version=1,
            step_us=1000,
            logprobs=list(logprobs),
            timings=timings,
            kv_added=granules(outputs, "kv+"),
            kv_removed=granules(outputs, "kv-"),
        )

    def run(self) -> None:
        commands = self.pipe.commands()
        while True:
            idle = not any(sequence.produces for sequence in self.running.values())
            try:
                while True:
                    if not self.take(commands.get(block=idle)):
                        return
                    idle = False
            except queue.Empty:
                pass
            if any(sequence.produces for sequence in self.running.values()):
                self.step()
                time.sleep(0.001)  # a step takes time


def scores(sequence: Sequence) -> bool:
    return sequence.start.request_id.startswith("score")


def prompt_scores(entry: int, start: m.Start) -> m.Logprobs:
    """Position p, counted from 1, has the score -p, and the alternatives 0, 1, 2 ... with the scores -p, -p - 1 ..."""
    k, places = start.params.prompt_logprobs, range(1, start.prompt_len)
    top_ids = list(range(k)) * len(places)
    return m.Logprobs(
        entry, True, [float(-p) for p in places], k, top_ids, [float(-p - i) for p in places for i in range(k)]
    )


def granules(outputs: list[tuple], kind: str) -> bytes:
    """Hashes end to end."""
    ids = [i for _, s, _, new, _ in outputs if s.start.request_id.startswith(kind) for i in new]
    return b"".join(i.to_bytes(16, "little") for i in ids)


def main() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parser = argparse.ArgumentParser()
    parser.add_argument("--source")
    parser.add_argument("--fd", type=int)
    options = parser.parse_args()
    pipe = Pipe(options.fd)
    assert pipe.receive() is not None  # the configuration
    if options.source == "broken":
        pipe.send(m.Fatal("OUT_OF_MEMORY", "the model does not fit"))
        return
    if options.source == "slow":
        signal.pause()
    pipe.send(m.ProgressChange(m.Progress.COMPILING))
    pipe.send(m.ProgressChange(m.Progress.OK))
    pipe.send(READY)
    ScriptedEngine(pipe).run()


if __name__ == "__main__":
    main()
