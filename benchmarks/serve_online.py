"""Measures the whole mesh on one machine: `python benchmarks/serve_online.py --model llama-1b --streams 1 64 1000`.

Starts Redis, a scheduler, one worker and gateway processes by `lmesh up`, and load clients in processes of their own,
which call Generate with token ids. `--streams N` keeps N requests running (closed loop), `--rate R` sends them at
random times, R a second on average (Poisson). One JSON line a case; the exit status is 1 when a request did not end
well.

ttft_ms     to the first token, as the client sees it; mesh_ttft_ms (of one stream) is what is left of it without the
            engine's own time, from its taking of the request to its first output.
itl_ms      between one message with tokens and the next, of which a busy gateway puts several into one; token_ms a
            request's mean a token after the first.
goodput     requests a second that kept `--goal-ttft-ms` and `--goal-token-ms`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from load_client import Order, Seen
from mesh_system import MeshSystem
from online_figures import Goal, figures, over_runs
from process_age import now
from results_file import cpu_name, file_name, record
from shapes import save_shape

_HERE = Path(__file__).parent
_LEAD_S = 0.3  # from the word to the start, so that all clients have heard it

_ALONE_ROUNDS = 8  # of a lone stream at least: one request is no figure


def main() -> None:
    """Parses the command line and measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help="a shape of shapes.py: llama-1b, llama-8b, qwen3-0.6b, tiny")
    what.add_argument("--path", help="any source that `lmesh up` takes")
    parser.add_argument("--streams", nargs="*", type=int, default=[], help="closed loops of so many requests at a time")
    parser.add_argument("--rate", nargs="*", type=float, default=[], help="Poisson arrivals, requests a second")
    parser.add_argument("--duration", type=float, default=30.0, help="seconds of arrivals")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=1, help="requests one after the other in each stream")
    parser.add_argument("--runs", type=int, default=3, help="of each case, after a warm-up that is not counted")
    parser.add_argument("--settle", type=float, default=0.0, help="seconds of rest after the first warm-up")
    parser.add_argument("--gateways", type=int, default=max(1, min(8, (os.cpu_count() or 1) // 3)))
    parser.add_argument("--clients", type=int, default=max(1, min(8, (os.cpu_count() or 1) // 3)))
    parser.add_argument("--goal-ttft-ms", type=float, default=500.0)
    parser.add_argument("--goal-token-ms", type=float, default=50.0)
    parser.add_argument("--vocab", type=int, default=0, help="ids below this; 0: the shape's, or 10,000")
    parser.add_argument("--engine", action="store_true", help="each closed loop through the engine alone as well")
    parser.add_argument("--device-name", default="", help="results/<name>.csv; else what nvidia-smi or /proc says")
    parser.add_argument("--record", action="store_true", help="write the results file")
    args = parser.parse_args()
    if not args.streams and not args.rate:
        parser.error("--streams or --rate: at least one case")
    rows = measure(args)
    if args.record:
        print(f"written: {record(args.device_name or device_file(), rows)}")
    sys.exit(1 if any(row["failed"] for row in rows) else 0)


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """All cases on one mesh, each printed as it is done; then the engine alone, if asked for."""
    with tempfile.TemporaryDirectory(prefix="lmesh-shape-") as folder:
        source = str(save_shape(Path(folder), args.model, tokenizer=True)) if args.model else args.path
        mesh = MeshSystem(source, gateways=args.gateways, load_format="dummy" if args.model else "auto")
        try:
            if args.settle:
                _run(args, mesh, streams=1, seed=0)
                time.sleep(args.settle)
            rows = [_closed(args, mesh, streams) for streams in args.streams]
            rows += [_poisson(args, mesh, rate) for rate in args.rate]
        finally:
            mesh.close()
    if args.engine:
        for row, streams in zip(rows, args.streams, strict=False):
            alone = engine_alone(args, streams)
            row |= {"engine_tok_s": alone, "engine_share": round(row["tok_s"] / alone, 3)}
            print(json.dumps(row), flush=True)
    return rows


def _closed(args: argparse.Namespace, mesh: MeshSystem, streams: int) -> dict[str, Any]:
    _run(args, mesh, streams=streams, seed=0)  # warms up
    runs = [_run(args, mesh, streams=streams, seed=1 + run) for run in range(args.runs)]
    return _say(args, mesh, f"{streams} streams {args.prompt}+{args.new}", runs)


def _poisson(args: argparse.Namespace, mesh: MeshSystem, rate: float) -> dict[str, Any]:
    _run(args, mesh, streams=max(1, round(rate)), seed=0)  # warms up
    runs = []
    for run in range(args.runs):
        rng, at, arrivals = random.Random(f"arrivals {run}"), 0.0, []
        while (at := at + rng.expovariate(rate)) < args.duration:
            arrivals.append(at)
        runs.append(_run(args, mesh, arrivals=arrivals or [0.0], seed=1 + run))
    return _say(args, mesh, f"{rate:g} a second {args.prompt}+{args.new}", runs)


def _say(args: argparse.Namespace, mesh: MeshSystem, case: str, runs: list[list[Seen]]) -> dict[str, Any]:
    goal = Goal(ttft_s=args.goal_ttft_ms / 1e3, token_s=args.goal_token_ms / 1e3)
    row = {
        "system": "mesh",
        "workload": case,
        **over_runs([figures(run, goal) for run in runs]),
        "runs": len(runs),
        "model": args.model or args.path,
        "version": mesh.version,
        "startup_s": round(mesh.startup_s, 2),
        "gateways": args.gateways,
        "clients": args.clients,
    }
    print(json.dumps(row), flush=True)
    for error in sorted({seen.error for run in runs for seen in run if seen.error})[:3]:
        print(f"  failed: {error}", file=sys.stderr)
    return row


def _run(
    args: argparse.Namespace, mesh: MeshSystem, *, seed: int, streams: int = 0, arrivals: list[float] | None = None
) -> list[Seen]:
    """One run of a case over all clients."""
    times = arrivals or []
    count = max(1, min(args.clients, streams or len(times)))
    orders = [
        Order(
            target=mesh.target,
            seed=seed * 1000 + index,
            vocab=args.vocab or (_vocab(args.model) if args.model else 10_000),
            prompt=args.prompt,
            new=args.new,
            streams=len(range(index, streams, count)),
            rounds=max(args.rounds, _ALONE_ROUNDS) if streams == 1 else args.rounds,
            arrivals=times[index::count],
            timeline=streams == 1,
        )
        for index in range(count)
    ]
    return run_clients(orders)


def run_clients(orders: list[Order]) -> list[Seen]:
    """One client process an order, all starting at one moment; what they saw. RuntimeError when one dies."""
    command = [sys.executable, str(_HERE / "load_client.py")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    clients = [subprocess.Popen(command, **pipes) for _ in orders]  # type: ignore[call-overload]
    try:
        for client, order in zip(clients, orders, strict=True):
            print(json.dumps(asdict(order)), file=client.stdin, flush=True)
        for client in clients:
            _answer(client)
        begin = now() + _LEAD_S
        for client in clients:
            print(begin, file=client.stdin, flush=True)
        return [Seen(**seen) for client in clients for seen in json.loads(_answer(client))]
    finally:
        for client in clients:
            client.stdin.close()
            client.kill()
            client.wait()


def _answer(client: subprocess.Popen[str]) -> str:
    assert client.stdout is not None
    line = client.stdout.readline()
    if not line:
        raise RuntimeError(f"a load client ended with status {client.wait()}")
    return line


def _vocab(model: str) -> int:
    from shapes import SHAPES

    return int(SHAPES[model]["vocab_size"])


def engine_alone(args: argparse.Namespace, streams: int) -> float:
    """Output tokens a second of the engine in a process of its own, as many requests at once as there were streams."""
    script, what = str(_HERE / "serve_offline.py"), ["--model", args.model] if args.model else ["--path", args.path]
    workload = f"{streams}x{args.prompt}+{args.new}"
    command = [sys.executable, script, *what, "--workload", workload, "--runs", str(args.runs)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1])["tok_s"])


def device_file() -> str:
    """The device's results file, found without torch."""
    try:
        asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        names = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        names = []
    return file_name(names[0]) if names else cpu_name()


if __name__ == "__main__":
    main()
