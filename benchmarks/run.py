"""Measures W1-W3: `python benchmarks/run.py` runs every system in turn; one JSON line a case.

Each system runs in a process of its own, one after the other, so that none shares threads or memory with
another. Figures: output tokens a second over the wall time of a run, the median of `--runs` runs.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Protocol

from workloads import WORKLOADS, Job, make, warm_up

SYSTEMS = ("transformers", "engine", "mesh")
RESULTS = Path(__file__).parent / "results"
FIELDS = ("system", "workload", "tok_s", "tok_s_min", "tok_s_max", "wall_s", "ttft_s", "runs", "model", "version")


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
        from transformers_peer import TransformersPeer

        return TransformersPeer(files, threads)
    if name == "engine":
        from engine_system import EngineSystem

        return EngineSystem(files, threads)
    from mesh_system import MeshSystem

    return MeshSystem(files, threads)


def measure(system: System, workload: str, runs: int) -> dict[str, Any]:
    """One case: median, least and most of `runs` runs, each with prompts of its own."""
    walls, rates, firsts = [], [], []
    for run in range(runs):
        jobs = make(workload, run)
        begin = time.perf_counter()
        first = system.run(jobs)
        wall = time.perf_counter() - begin
        walls.append(wall)
        rates.append(sum(j.new_tokens for j in jobs) / wall)
        firsts.append(statistics.mean(first))
    return {
        "workload": workload,
        "tok_s": round(statistics.median(rates), 2),
        "tok_s_min": round(min(rates), 2),
        "tok_s_max": round(max(rates), 2),
        "wall_s": round(statistics.median(walls), 3),
        "ttft_s": round(statistics.median(firsts), 3),
        "runs": runs,
    }


def run_system(name: str, args: argparse.Namespace) -> None:
    """Measures one system in this process and prints its lines."""
    system = build(name, args.model, args.threads)
    try:
        system.run(warm_up())
        for workload in args.workloads.split(","):
            case = measure(system, workload, args.runs)
            print(json.dumps({"system": name, **case, "model": args.model, "version": system.version}), flush=True)
    finally:
        system.close()


def device_name() -> str:
    """The device as a file name, such as `cpu-amd-epyc-2-threads`."""
    model = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    return f"cpu-{model.lower().replace(' ', '-')}-{os.cpu_count()}-threads"


def run_all(args: argparse.Namespace) -> None:
    """Measures the systems one after the other, then prints a table and writes results/<device>.csv."""
    rows: list[dict[str, Any]] = []
    for name in args.systems.split(","):
        command = [sys.executable, __file__, "--only", name, "--model", args.model, "--workloads", args.workloads]
        command += ["--runs", str(args.runs), "--threads", str(args.threads)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            for line in child.stdout:
                if line.startswith("{"):
                    rows.append(json.loads(line))
                    print(line, end="", flush=True)
        if child.returncode:
            raise SystemExit(f"{name} ended with {child.returncode}")
    table(rows)
    if args.record:
        record(rows)


def table(rows: list[dict[str, Any]]) -> None:
    """Prints workloads down, systems across: output tokens a second (mean seconds to the first token)."""
    systems = list(dict.fromkeys(r["system"] for r in rows))
    print(f"\n{'tok/s (ttft s)':16}" + "".join(f"{s:>22}" for s in systems))
    for workload in dict.fromkeys(r["workload"] for r in rows):
        cells = {r["system"]: f"{r['tok_s']:.1f} ({r['ttft_s']:.2f})" for r in rows if r["workload"] == workload}
        print(f"{workload:16}" + "".join(f"{cells.get(s, '-'):>22}" for s in systems))


def record(rows: list[dict[str, Any]]) -> None:
    """Writes the figures to results/<device>.csv."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{device_name()}.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    print(f"\nwritten: {path}")


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
        run_system(args.only, args)
    else:
        run_all(args)


if __name__ == "__main__":
    main()
