"""The engine alone, in this process: the step loop without network, server process or gateway."""

from __future__ import annotations

import time

import torch
from lmesh_kernels.text.resolve import ModelFiles
from lmesh_worker.engine.config import EngineConfig
from lmesh_worker.engine.engine import Engine
from lmesh_worker.messages import Params, Start
from workloads import Job


class EngineSystem:
    """Submits all jobs at once and steps until they have ended."""

    def __init__(self, files: ModelFiles, config: EngineConfig) -> None:
        self.engine = Engine(config, files)
        self._next_key = 0
        self.version = f"lmesh, torch {torch.__version__}"

    def run(self, jobs: list[Job]) -> list[float]:
        """Seconds to the first token of each job."""
        begin, first, counts = time.perf_counter(), {}, {}
        for job in jobs:
            key, self._next_key = self._next_key, self._next_key + 1
            counts[key] = 0
            params = Params(max_tokens=job.new_tokens)
            self.engine.add(Start(key, str(key), 0, list(job.prompt), len(job.prompt), params))
        while self.engine.has_work:
            report = self.engine.step()
            if report is None:
                continue
            if report.errors:
                raise RuntimeError(f"{report.errors[0].reason}: {report.errors[0].message}")
            now = time.perf_counter() - begin
            for key, n_new in zip(report.keys, report.n_new, strict=True):
                if n_new:
                    first.setdefault(key, now)
                    counts[key] += n_new
        short = [c for c, job in zip(counts.values(), jobs, strict=True) if c != job.new_tokens]
        if short:
            raise RuntimeError(f"outputs of another length than asked for: {short}")
        return list(first.values())

    def close(self) -> None:
        """Frees the engine."""
        self.engine.close()
