"""Measures the engine alone, in this process: `python benchmarks/serve_offline.py --model llama-1b --workload G1 G2`.

One JSON line a case. A shape (`--model`) is served with random weights, a folder or file (`--path`) with its own. Run 0
of a workload warms up and is not counted; figures are medians of the `--runs` after it, each with ids of its own.
`startup_s` is from the start of the process to the first token; with `--cold` the script starts itself anew with empty
kernel caches first. `floor_share` is the least time that the work could take on this device (see floor.py, from the
copy and product rates measured in the same run) over the time that it took: 1 is the floor.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from process_age import BEGAN, now, process_age_s

# What compiled kernels are kept in, by whoever compiles them.
CACHES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "CUDA_CACHE_PATH")
_COLD = "LMESH_BENCH_COLD"

_WORDS = {"on": "true", "off": "false"}  # of settings, beside what EngineConfig reads itself


def main() -> None:
    """Parses the command line and measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help="a shape of shapes.py: llama-1b, llama-8b, qwen3-0.6b, tiny")
    what.add_argument("--path", help="any source that `lmesh up` takes")
    parser.add_argument("--workload", nargs="*", default=["G1", "G2", "G3", "G4"], help="G1-G4, W1-W3, or 64x512+256")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--cold", action="store_true", help="start with empty kernel caches")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings of the engine")
    parser.add_argument("--profile", nargs="*", type=int, metavar="ROWS", help="profile decode steps, of 1 and 64 rows")
    parser.add_argument("--transformers", action="store_true", help="G1 through transformers' generate as well")
    parser.add_argument("--peer-batch", type=int, default=64, help="requests in one of its padded batches")
    parser.add_argument("--record", action="store_true", help="write results/<device>.csv")
    args = parser.parse_args()
    if args.cold and _COLD not in os.environ:
        _start_cold()
    with tempfile.TemporaryDirectory(prefix="lmesh-shape-") as folder:
        rows = Offline(args, Path(folder)).run()
    if args.record:
        _record(rows)


def _start_cold() -> None:
    """Becomes the same command with empty kernel caches; its clock starts here."""
    with tempfile.TemporaryDirectory(prefix="lmesh-cold-") as folder:
        caches = {name: str(Path(folder) / name.lower()) for name in CACHES}
        # A child, so that the folder goes when it is done.
        command = [sys.executable, *sys.argv]
        code = os.spawnve(os.P_WAIT, sys.executable, command, {**os.environ, **caches, _COLD: "1", BEGAN: str(now())})
    sys.exit(code)


class Offline:
    """One engine, the cases asked of it, and their lines. `folder` is where a shape's config is written."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        # Heavy imports belong to the start that is measured, and to nothing before it.
        import msgspec
        import torch
        from engine_system import EngineSystem
        from lmesh_kernels.text.resolve import local_files, resolve
        from lmesh_worker.engine.config import EngineConfig
        from shapes import save_shape
        from workloads import Job

        self._args, self._name = args, args.model or args.path
        settings = {"load_format": "dummy"} if args.model else {}
        settings |= {name: _WORDS.get(value, value) for name, _, value in (o.partition("=") for o in args.set)}
        try:
            config = msgspec.convert(settings, EngineConfig, strict=False)
        except msgspec.ValidationError as error:
            sys.exit(f"--set: {error}")
        if args.model:
            self._files = local_files(save_shape(folder, args.model, tokenizer=False))
        else:
            self._files = resolve(args.path)
        self._system = EngineSystem(self._files, config)
        self._system.run([Job(tuple(range(3, 19)), 1)])
        self.startup_s = process_age_s()
        self._torch = torch

    def run(self) -> list[dict[str, Any]]:
        """All cases, printed as they are done."""
        from card import measure_card
        from lmesh_kernels.models.config import load_config

        engine = self._system.engine
        self._model = load_config(self._files)
        self._card = measure_card(engine.platform.device)
        rows = [self._case(name) for name in self._args.workload]
        if self._args.profile is not None:
            self._profile(self._args.profile or [1, 64])
        if self._args.transformers:
            rows.append(self._peer({row["workload"]: row["tok_s"] for row in rows}))
        else:
            self._system.close()
        return rows

    def _case(self, workload: str) -> dict[str, Any]:
        from floor import least_work
        from workloads import make

        engine, walls, firsts = self._system.engine, [], []
        for run in range(self._args.runs + 1):
            jobs = make(workload, run, vocab=self._model.vocab_size)
            begin = time.perf_counter()
            first = self._system.run(jobs)
            if run:
                walls.append(time.perf_counter() - begin)
                firsts.append(statistics.mean(first))
        work = least_work(self._model, jobs, engine.plan.dtype)
        line = self._line("engine", workload, jobs, walls, firsts, self._system.version)
        floor_s = work.seconds(self._card)
        line |= {"floor_s": round(floor_s, 4), "floor_share": round(floor_s / line["wall_s"], 3)}
        line |= {"startup_s": round(self.startup_s, 2), "kernel_cache": "empty" if _COLD in os.environ else "as it was"}
        return self._say(line)

    def _peer(self, ours: Mapping[str, float]) -> dict[str, Any]:
        """G1 in padded batches through transformers, on the decoder's weights; the engine is gone by then."""
        from transformers_peer import TransformersPeer, twin_of
        from workloads import make, warm_up

        decoder = self._system.engine.decoder
        self._system.close()
        del self._system
        if decoder.arena.device.type == "cuda":
            self._torch.cuda.empty_cache()
        peer = TransformersPeer(twin_of(decoder, self._files.path), batch=self._args.peer_batch)
        workload = "G1" if "G1" in self._args.workload else self._args.workload[0]
        jobs = make(workload, 1, vocab=self._model.vocab_size)
        peer.run([type(job)(tuple(i % 64 for i in job.prompt), job.new_tokens) for job in warm_up()])
        begin = time.perf_counter()
        first = peer.run(jobs)
        walls = [time.perf_counter() - begin]
        line = self._line("transformers", workload, jobs, walls, [statistics.mean(first)], peer.version)
        return self._say(line | {"engine_times": round(ours[workload] / line["tok_s"], 2)})

    def _line(
        self, system: str, workload: str, jobs: Sequence[Any], walls: list[float], firsts: list[float], version: str
    ) -> dict[str, Any]:
        wall, new = statistics.median(walls), sum(job.new_tokens for job in jobs)
        return {
            "system": system,
            "workload": workload,
            "tok_s": round(new / wall, 1),
            "tok_s_min": round(new / max(walls), 1),
            "tok_s_max": round(new / min(walls), 1),
            "wall_s": round(wall, 4),
            "ttft_s": round(statistics.median(firsts), 4),
            "runs": len(walls),
            "model": self._name,
            "version": version,
            "in_tok_s": round(sum(len(job.prompt) for job in jobs) / wall, 1),
            "device": self._card.name,
            "copy_tb_s": self._card.copy_tb_s,
            "matmul_tflop_s": self._card.matmul_tflop_s,
        }

    def _profile(self, rows: list[int]) -> None:
        from step_profile import profile_decode

        for count in rows:
            found = profile_decode(self._system.engine, count)
            print(json.dumps({"model": self._name, **found.line()}), flush=True)
            print(found.table(), flush=True)

    @staticmethod
    def _say(line: dict[str, Any]) -> dict[str, Any]:
        print(json.dumps(line), flush=True)
        return line


def _record(rows: list[dict[str, Any]]) -> None:
    import torch
    from results_file import cpu_name, file_name, record

    name = file_name(rows[0]["device"]) if torch.cuda.is_available() else cpu_name()
    print(f"written: {record(name, [{k: v for k, v in row.items() if k != 'device'} for row in rows])}")


if __name__ == "__main__":
    main()
