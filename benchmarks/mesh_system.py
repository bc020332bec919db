"""The whole mesh under measurement: `lmesh up` with one worker, called over gRPC with token ids."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping

import grpc.aio
from lmesh.inference.v1 import inference_pb2 as pb
from lmesh.inference.v1 import inference_pb2_grpc
from workloads import Job

MODEL = "bench"


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def request_of(job: Job) -> pb.GenerateRequest:
    """A job as a client asks for it: greedy, to its full length."""
    return pb.GenerateRequest(
        model=MODEL,
        tokens=pb.TokenInput(ids=job.prompt),
        sampling=pb.SamplingParams(temperature=0.0),
        stop=pb.StopParams(max_tokens=job.new_tokens, ignore_eos=True),
    )


class MeshSystem:
    """A mesh of its own in a temporary run folder. `settings` are LMESH_* variables."""

    def __init__(
        self, source: str, *, gateways: int = 1, load_format: str = "auto", settings: Mapping[str, str] | None = None
    ) -> None:
        self._folder = tempfile.mkdtemp(prefix="lmesh-bench-")
        self._env = {**os.environ, "LMESH_RUN_DIR": self._folder, **(settings or {})}
        self.target = f"127.0.0.1:{(port := _free_port())}"
        shape = ["--grpc-port", str(port), "--http-port", str(_free_port()), "--gateways", str(gateways)]
        begin = time.perf_counter()
        try:
            self._cli("up", *shape, "--trainers", "0", "--load-format", load_format, "--model", f"{MODEL}={source}")
        except subprocess.CalledProcessError:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise
        self.startup_s = time.perf_counter() - begin
        self.version = "lmesh"

    def _cli(self, *args: str) -> None:
        command = [sys.executable, "-P", "-m", "lmesh_cli.app", *args]
        subprocess.run(command, env=self._env, check=True, stdin=subprocess.DEVNULL, stdout=sys.stderr)

    def run(self, jobs: list[Job]) -> list[float]:
        """Seconds to the first token of each job, as its client sees it."""
        return asyncio.run(self._run(jobs))

    async def _run(self, jobs: list[Job]) -> list[float]:
        async with grpc.aio.insecure_channel(self.target) as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            return list(await asyncio.gather(*(self._one(stub, job) for job in jobs)))

    async def _one(self, stub: inference_pb2_grpc.InferenceServiceAsyncStub, job: Job) -> float:
        begin, first, count = time.perf_counter(), 0.0, 0
        async for event in stub.Generate(request_of(job), timeout=1_200):
            if event.HasField("delta"):
                first = first or time.perf_counter() - begin
                count += len(event.delta.token_ids)
        if count != job.new_tokens:
            raise RuntimeError(f"{count} tokens came, {job.new_tokens} were asked for")
        return first

    def close(self) -> None:
        """`lmesh down`, and the run folder with it."""
        self._cli("down")
        shutil.rmtree(self._folder, ignore_errors=True)
