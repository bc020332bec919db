"""Many seeds of the simulation: `python -P -m tests.chaos.soak --seconds 600 --first 0`; prints what it found."""

from __future__ import annotations

import argparse
import gc
import logging
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import redis
from lmesh_cli import redis_server as embedded

from tests.chaos.simulation import Outcome, Shape, simulate
from tests.redis_server import memory_only

START_S = 20.0


@contextmanager
def store() -> Iterator[redis.Redis]:
    """A Redis of one's own, and a blocking client of it."""
    folder = Path(tempfile.mkdtemp(prefix="lmr-"))
    process = subprocess.Popen(memory_only(folder), stdout=subprocess.DEVNULL)
    try:
        client = redis.Redis(unix_socket_path=str(embedded.socket_path(folder)))
        deadline = time.perf_counter() + START_S
        while True:
            try:
                client.ping()
                break
            except redis.ConnectionError:
                assert time.perf_counter() < deadline and process.poll() is None, "the Redis server did not start"
                time.sleep(0.02)
        yield client
        client.close()
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


@dataclass
class Soaked:
    """What many seeds showed."""

    seeds: int = 0
    seconds: float = 0.0
    virtual_s: float = 0.0
    steps: int = 0
    streams: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    bad: list[Outcome] = field(default_factory=list)

    def add(self, outcome: Outcome) -> None:
        self.seeds += 1
        self.virtual_s += outcome.virtual_s
        self.steps += outcome.steps
        self.streams += outcome.streams
        self.outcomes += outcome.outcomes
        self.faults += outcome.faults
        if outcome.violations:
            self.bad.append(outcome)

    def summary(self) -> str:
        """For people."""
        return "\n".join(
            [
                f"{self.seeds} seeds in {self.seconds:.1f} s, {60 * self.seeds / self.seconds:.0f} a minute",
                f"{self.virtual_s:.0f} virtual seconds, {self.steps} steps, {self.streams} client streams",
                f"outcomes {dict(self.outcomes.most_common())}",
                f"faults {dict(self.faults.most_common())}",
            ]
        )


def soak(*, seconds: float, seeds: int, first: int, shape: Shape, most_bad: int = 5) -> Soaked:
    """Runs seeds from `first` on for so long or so many, and until so many were bad."""
    logging.disable(logging.CRITICAL)
    gc.freeze()
    began, soaked = time.perf_counter(), Soaked()
    try:
        with store() as client:
            for seed in range(first, first + seeds):
                if time.perf_counter() - began > seconds or len(soaked.bad) >= most_bad:
                    break
                soaked.add(simulate(seed, client, shape))
    finally:
        logging.disable(logging.NOTSET)
    soaked.seconds = time.perf_counter() - began
    return soaked


def main() -> None:
    """Prints every bad seed's story and a summary."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seeds", type=int, default=10**9)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--faults", type=int, default=5)
    parser.add_argument("--kinds", nargs="*", help="kinds of faults, by name; all unless given")
    parser.add_argument("--most-bad", type=int, default=5)
    options = parser.parse_args()
    shape = Shape(
        clients=options.clients,
        faults=options.faults,
        kinds=None if options.kinds is None else frozenset(options.kinds),
    )
    soaked = soak(
        seconds=options.seconds, seeds=options.seeds, first=options.first, shape=shape, most_bad=options.most_bad
    )
    for outcome in soaked.bad:
        print(outcome.told(), end="\n\n")
    print(soaked.summary())
    raise SystemExit(1 if soaked.bad else 0)


if __name__ == "__main__":
    main()
