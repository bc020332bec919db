"""A client of a mesh's public training API, and of generation with what it trained."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
from lmesh.inference.v1 import inference_pb2 as ip
from lmesh.inference.v1 import inference_pb2_grpc
from lmesh.training.v1 import training_pb2 as pb
from lmesh.training.v1 import training_pb2_grpc

CHUNK = 1 << 20


class TrainingClient:
    """Over one channel to a gateway."""

    def __init__(self, target: str) -> None:
        self.channel = grpc.insecure_channel(target)
        self.training = training_pb2_grpc.TrainingServiceStub(self.channel)
        self.inference = inference_pb2_grpc.InferenceServiceStub(self.channel)

    def close(self) -> None:
        self.channel.close()

    def upload(self, path: Path) -> str:
        """The dataset as a job's source."""
        data = path.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        pieces = [pb.UploadRequest(digest=digest, size=len(data))]
        pieces += [pb.UploadRequest(offset=at, data=data[at : at + CHUNK]) for at in range(0, len(data), CHUNK)]
        assert self.training.Upload(iter(pieces), timeout=60).received == len(data)
        return f"artifact:{digest}/{path.name}"

    def create(self, spec: pb.JobSpec, publish_as: str = "", job_id: str = "") -> str:
        request = pb.CreateJobRequest(job_id=job_id or uuid.uuid4().hex[:8], spec=spec, publish_as=publish_as)
        return self.training.CreateJob(request, timeout=30).job.job_id

    def watch(self, job_id: str, after: int = 0) -> Iterator[pb.JobEvent]:
        for response in self.training.WatchJob(pb.WatchJobRequest(job_id=job_id, after=after), timeout=300):
            yield from response.events

    def ended(self, job_id: str) -> pb.Job:
        """The job once it has ended."""
        for _ in self.watch(job_id):
            pass
        return self.training.GetJob(pb.GetJobRequest(job_id=job_id), timeout=30).job

    def losses(self, job_id: str) -> dict[int, float]:
        """The last reported loss of each step."""
        return {e.step.global_step: e.step.loss for e in self.watch(job_id) if e.WhichOneof("event") == "step"}

    def download(self, digest: str) -> bytes:
        return b"".join(r.data for r in self.training.Download(pb.DownloadRequest(digest=digest), timeout=60))

    def generate(self, model: str, ids: list[int], max_tokens: int, **options: Any) -> Generated:
        """Greedy unless told."""
        call = self.stream(model, ids, max_tokens, **options)
        return Generated().read(call)

    def stream(self, model: str, ids: list[int], max_tokens: int, **options: Any) -> Any:
        output = ip.OutputOptions(logprobs=0, prompt_logprobs=0) if options.pop("scored", False) else None
        request = ip.GenerateRequest(
            model=model,
            tokens=ip.TokenInput(ids=ids),
            sampling=ip.SamplingParams(**({"temperature": 0.0} | options)),
            stop=ip.StopParams(max_tokens=max_tokens, ignore_eos=True),
            output=output,
            request_id=str(uuid.uuid4()),
        )
        return self.inference.Generate(request, timeout=120)


class Generated:
    """What one call gave."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.logprobs: list[float] = []  # the prompt's from its second id, then those of `ids`
        self.cached_tokens = 0

    def read(self, call: Any) -> Generated:
        prompt: list[float] = []
        for event in call:
            if event.WhichOneof("event") == "delta":
                self.ids += event.delta.token_ids
                prompt += [one.token.logprob for one in event.delta.prompt_logprobs]
                self.logprobs += [one.token.logprob for one in event.delta.logprobs]
            elif event.WhichOneof("event") == "finish":
                self.cached_tokens = event.finish.usage.cached_tokens
        self.logprobs = prompt + self.logprobs
        return self
