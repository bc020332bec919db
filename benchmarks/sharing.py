"""What two workers share and two tenants divide, on a real mesh: `python benchmarks/sharing.py`; prints two tables.

A tiny random model keeps it short: what is measured is where the scheduler puts requests, which no model changes.
"""

from __future__ import annotations

import asyncio
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path

import grpc
from lmesh.inference.v1 import inference_pb2 as pb
from lmesh.inference.v1 import inference_pb2_grpc
from lmesh_chassis.api_keys import digest_of

sys.path.append(str(Path(__file__).parents[1]))  # at the end: nothing of the checkout may hide an installed package

from tests.chaos.real_mesh import MODEL, RealMesh, real_mesh, until
from tests.tiny_model import save_tiny_llama

KEYS = {"a": "lmk_benchmark-a", "b": "lmk_benchmark-b"}
PREFIX, OWN, NEW, BURST = 256, 16, 16, 32
BACKLOG, LONG = 48, 96


def _request(ids: list[int], new: int, n: int = 1) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        model=MODEL,
        tokens=pb.TokenInput(ids=ids),
        sampling=pb.SamplingParams(temperature=0.0, n=n),
        stop=pb.StopParams(max_tokens=new, ignore_eos=True),
    )


def _as(tenant: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {KEYS[tenant]}"),)


async def burst(mesh: RealMesh, prefix: list[int], rng: random.Random) -> tuple[Counter[str], int]:
    """Requests that share a prefix, all at once: how many each worker had, and tokens that came from the cache."""
    async with grpc.aio.insecure_channel(mesh.target) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)

        async def one() -> tuple[str, int]:
            ids = prefix + [rng.randrange(5, 60) for _ in range(OWN)]
            events = [event async for event in stub.Generate(_request(ids, NEW), metadata=_as("a"))]
            wanted = pb.GetRequestRequest(request_id=events[0].accepted.request_id)
            record = await stub.GetRequest(wanted, metadata=_as("a"))
            return record.worker_id, events[-1].finish.usage.cached_tokens

        answers = await asyncio.gather(*(one() for _ in range(BURST)))
    return Counter(worker for worker, _ in answers), sum(cached for _, cached in answers)


async def shares(mesh: RealMesh) -> tuple[dict[str, int], int]:
    """Tokens of each tenant while both have a backlog, and how many requests each sent; A sends its own first."""
    received, left, over = dict.fromkeys(KEYS, 0), dict.fromkeys(KEYS, BACKLOG), asyncio.Event()
    async with grpc.aio.insecure_channel(mesh.target) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)

        async def one(tenant: str, seed: int) -> None:
            ids = [random.Random(f"{tenant}{seed}").randrange(5, 60) for _ in range(OWN)]
            async for event in stub.Generate(_request(ids, LONG), metadata=_as(tenant)):
                if event.WhichOneof("event") == "delta":
                    received[tenant] += len(event.delta.token_ids)
            left[tenant] -= 1
            if left[tenant] < BACKLOG // 4:
                over.set()

        tasks = []
        for tenant in KEYS:
            tasks += [asyncio.create_task(one(tenant, seed)) for seed in range(BACKLOG)]
            await asyncio.sleep(0.2)
        await over.wait()
        found = dict(received)
        await asyncio.gather(*tasks)
    return found, BACKLOG


def main() -> None:
    """One mesh for all of it; four sequences a worker, so that there is a queue."""
    rng = random.Random(0)
    with tempfile.TemporaryDirectory(prefix="lms-") as name:
        folder = Path(name)
        tenants = folder / "tenants.toml"
        tenants.write_text("".join(f'[tenants.{t}]\nkey_digests = ["{digest_of(k)}"]\n' for t, k in KEYS.items()))
        settings = {f"LMESH_{service}_TENANTS_FILE": str(tenants) for service in ("GATEWAY", "SCHEDULER")}
        settings |= {"LMESH_API_KEY": KEYS["a"], "LMESH_WORKER_MAX_SEQS": "4"}
        model = save_tiny_llama(folder / "model")
        with real_mesh(folder / "run", model, settings=settings) as mesh:
            until(lambda: len(mesh.placeable()) == 2, "two workers")
            prefix = [rng.randrange(5, 60) for _ in range(PREFIX)]
            print(f"{BURST} requests that share {PREFIX} of {PREFIX + OWN} prompt tokens | by worker | from the cache")
            for told in ("all at once, nothing cached", "once more", "with a scheduler just restarted"):
                if told.startswith("with"):
                    mesh.kill("scheduler")
                    until(lambda: mesh.well and len(mesh.placeable()) == 2, "the mesh is back")
                by_worker, cached = asyncio.run(burst(mesh, prefix, rng))
                share = cached / (BURST * (PREFIX + OWN))
                print(f"{told} | {dict(sorted(by_worker.items()))} | {share:.0%}")
            found, sent = asyncio.run(shares(mesh))
            total = sum(found.values())
            print(f"two tenants, {sent} requests each | " + ", ".join(f"{t} {c / total:.1%}" for t, c in found.items()))


if __name__ == "__main__":
    main()
