"""Seeded rounds of chaos on a real mesh: `python benchmarks/chaos.py --rounds 200`; prints a table, and each bad round.

Each round opens streams on two workers and two gateway processes, strikes while all of them flow, and compares every
id with the undisturbed run's (float32 on the CPU). A tiny random model keeps the rounds short; what is measured is what
the mesh adds, not the model.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # at the end: nothing of the checkout may hide an installed package

from tests.chaos.real_mesh import real_mesh
from tests.chaos.rounds import KINDS, STREAMS, WORDS, Round, play, undisturbed
from tests.tiny_model import save_tiny_llama


def main() -> None:
    """Exits 1 when any stream was lost or wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-tokens", type=int, default=300)
    parser.add_argument("--kinds", nargs="*", choices=sorted(KINDS), default=sorted(KINDS))
    options = parser.parse_args()
    rounds: list[Round] = []
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="lmc-") as folder:
        model = save_tiny_llama(Path(folder) / "model")
        with real_mesh(Path(folder) / "run", model) as mesh:
            due = {count: undisturbed(mesh, count, options.max_tokens) for count in sorted(set(STREAMS.values()))}
            rng = random.Random(options.seed)
            for seed in range(options.seed, options.seed + options.rounds):
                kind = rng.choice(options.kinds)
                found = play(mesh, kind, seed, due[STREAMS[kind]], options.max_tokens)
                rounds.append(found)
                if not found.good:
                    print(json.dumps(vars(found)), flush=True)
    print(table(rounds))
    print(f"{len(rounds)} rounds in {time.monotonic() - began:.0f} s")
    sys.exit(0 if all(found.good for found in rounds) else 1)


def table(rounds: list[Round]) -> str:
    """One line a kind of blow, in Markdown."""
    titles = [
        "blow",
        "rounds",
        "streams",
        "lost",
        "wrong ids",
        "not replayed",
        "blocks leaked",
        "resumed",
        "of these from the start",
        "not durable",
        "silent for 0.5 s",
    ]
    titles += ["longest silence, median / max", "new request served, median / max"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for kind in sorted({found.kind for found in rounds}):
        mine = [found for found in rounds if found.kind == kind]
        gaps, placed = [found.gap_s for found in mine], [found.placed_s for found in mine]
        cells = [
            WORDS[kind],
            len(mine),
            sum(found.streams for found in mine),
            sum(len(found.lost) for found in mine),
            sum(len(found.wrong) for found in mine),
            sum(len(found.forgotten) for found in mine),
            sum(found.leaked for found in mine),
            sum(found.resumed for found in mine),
            sum(found.behind for found in mine),
            sum(found.not_durable for found in mine),
            sum(found.felt for found in mine),
            f"{statistics.median(gaps):.2f} / {max(gaps):.2f} s",
            f"{statistics.median(placed):.2f} / {max(placed):.2f} s",
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
