"""Measures W1-W3: `python benchmarks/run.py`; one JSON line a case.

Each system lives in a process of its own and only one works at a time. They take turns run by run, so that a machine
whose speed drifts slows all of them alike. Figures: output tokens a second over the wall time of a run, the median of
`--runs` runs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from results_file import cpu_name, record
from workloads import WORKLOADS, Job, make, warm_up

SYSTEMS = ("transformers", "engine", "mesh")


class System(Protocol):
    """Something that serves jobs."""

    version: str

    def run(self, jobs: list[Job]) -> list[float]:
        """Serves all jobs at once, each to its full length; seconds to the first token of each."""

    def close(self) -> None:
        """Stops whatever it started."""


def build(name: str, model: str, threads: int) -> System:
    """Starts the named system on `model`."""
    from lmesh_kernels.text.resolve import resolve

    files = resolve(model)
    if name == "transformers":
        from transformers_peer import TransformersPeer, load_reference

        return TransformersPeer(load_reference(files), threads=threads)
    if name == "engine":
        from engine_system import EngineSystem
        from lmesh_worker.engine.config import EngineConfig

        return EngineSystem(files, EngineConfig(device="cpu", dtype="float32", threads=threads))
    from mesh_system import MeshSystem

    return MeshSystem(files.source, settings={"LMESH_WORKER_THREADS": str(threads)})


@dataclass(frozen=True, slots=True)
class Run:
    """One run of one system: output tokens a second, seconds in all, mean seconds to the first token."""

    tok_s: float
    wall_s: float
    ttft_s: float


def measure(system: System, workload: str, run: int) -> Run:
    """One run, with prompts of its own."""
    jobs = make(workload, run)
    begin = time.perf_counter()
    first = system.run(jobs)
    wall = time.perf_counter() - begin
    return Run(sum(j.new_tokens for j in jobs) / wall, wall, statistics.mean(first))


def serve(name: str, args: argparse.Namespace) -> None:
    """The child's side: starts the system, then measures what each line of stdin names (`W1 0`)."""
    system = build(name, args.model, args.threads)
    try:
        system.run(warm_up())
        print(json.dumps({"version": system.version}), flush=True)
        for line in sys.stdin:
            workload, run = line.split()
            print(json.dumps(asdict(measure(system, workload, int(run)))), flush=True)
    finally:
        system.close()


class Child:
    """One system in its process, warm and idle until it is asked."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        command = [sys.executable, __file__, "--only", name, "--model", args.model, "--threads", str(args.threads)]
        self.name = name
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.version = str(self._answer()["version"])

    def measure(self, workload: str, run: int) -> Run:
        """Asks for one run and waits for it."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{workload} {run}\n")
        self._process.stdin.flush()
        return Run(**self._answer())

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                return answer
        raise SystemExit(f"{self.name} ended with {self._process.wait()}")

    def close(self) -> None:
        """Ends the process: its stdin ends."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def case(child: Child, workload: str, runs: list[Run], model: str) -> dict[str, Any]:
    """The line of one system on one workload."""
    rates = [run.tok_s for run in runs]
    return {
        "system": child.name,
        "workload": workload,
        "tok_s": round(statistics.median(rates), 2),
        "tok_s_min": round(min(rates), 2),
        "tok_s_max": round(max(rates), 2),
        "wall_s": round(statistics.median(run.wall_s for run in runs), 3),
        "ttft_s": round(statistics.median(run.ttft_s for run in runs), 3),
        "runs": len(runs),
        "model": model,
        "version": child.version,
    }


def run_all(args: argparse.Namespace) -> None:
    """Measures the systems in turns, then prints a table and, when asked, writes results/<device>.csv."""
    rows: list[dict[str, Any]] = []
    children = [Child(name, args) for name in args.systems.split(",")]
    try:
        for workload in args.workloads.split(","):
            runs: dict[str, list[Run]] = {child.name: [] for child in children}
            for run in range(args.runs):
                for child in children:
                    runs[child.name].append(child.measure(workload, run))
            for child in children:
                rows.append(case(child, workload, runs[child.name], args.model))
                print(json.dumps(rows[-1]), flush=True)
    finally:
        for child in children:
            child.close()
    table(rows)
    if args.record:
        print(f"\nwritten: {record(cpu_name(), rows)}")


def table(rows: list[dict[str, Any]]) -> None:
    """Prints workloads down, systems across: output tokens a second (mean seconds to the first token)."""
    systems = list(dict.fromkeys(r["system"] for r in rows))
    print(f"\n{'tok/s (ttft s)':16}" + "".join(f"{s:>22}" for s in systems))
    for workload in dict.fromkeys(r["workload"] for r in rows):
        cells = {r["system"]: f"{r['tok_s']:.1f} ({r['ttft_s']:.2f})" for r in rows if r["workload"] == workload}
        print(f"{workload:16}" + "".join(f"{cells.get(s, '-'):>22}" for s in systems))


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", default=",".join(SYSTEMS), help="comma list, in the order to run")
    parser.add_argument("--workloads", default=",".join(WORKLOADS), help="comma list of W1, W2, W3")
    parser.add_argument("--model", default="packaged:smollm2-135m-instruct", help="any source that `lmesh up` takes")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--record", action="store_true", help="write results/<device>.csv")
    parser.add_argument("--only", choices=SYSTEMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        serve(args.only, args)
    else:
        run_all(args)


if __name__ == "__main__":
    main()
