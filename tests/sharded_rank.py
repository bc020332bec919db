"""One update of a job, measured: gradients, and numbers of weights that a rank holds, gathers and remembers."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import msgspec
import pytest
import torch
import torch.distributed as dist
from lmesh_kernels import platforms
from lmesh_kernels.layers.packed_batch import pack_batch
from lmesh_kernels.layers.recompute import Recompute
from lmesh_kernels.models.config import load_config
from lmesh_kernels.models.home import Lookup
from lmesh_kernels.models.parameters import Precision
from lmesh_kernels.models.sharded import ShardedHome
from lmesh_kernels.text.resolve import resolve
from lmesh_kernels.text.tokenizer import load_tokenizer
from lmesh_trainer.base import load_base
from lmesh_trainer.data.dataset import load_dataset, microbatches
from lmesh_trainer.learner import Learner
from lmesh_trainer.optimiser import AdamW, Optimiser
from lmesh_trainer.process import leave_ranks
from lmesh_trainer.spec import JobSpec, make_spec
from lmesh_trainer.subject import make_subject
from torch import Tensor


def write(jobs: dict[str, JobSpec], folder: Path, parallelism: Literal["ddp", "fsdp"]) -> None:
    """For the ranks to read."""
    told = {n: msgspec.to_builtins(msgspec.structs.replace(job, parallelism=parallelism)) for n, job in jobs.items()}
    (folder / "measure.json").write_text(json.dumps(told))


def assert_same_gradients(alone: dict[str, Any], found: dict[str, Any], kind: str) -> None:
    """Both are what `measure` gave; a sum's order is all that may differ."""
    assert alone["norm"] > 0 and found["gradients"].keys() == alone["gradients"].keys()
    for name, gradient in alone["gradients"].items():
        apart = float((gradient - found["gradients"][name]).norm())
        assert apart <= 1e-5 * float(alone["norm"]), (kind, name)
    assert found["norm"] == pytest.approx(alone["norm"], rel=1e-5), kind


class Watch:
    """Counts what is gathered while a layer of a sharded home runs."""

    def __init__(self, home: ShardedHome) -> None:
        self._gathered: dict[int, Tensor] = {}  # every layer's weights once they were seen; freed ones have no storage
        self.at_once = self.passes = 0
        self._in_layer = home.in_layer
        home.in_layer = self.in_layer  # type: ignore[method-assign]

    def in_layer(self, index: int, run: Callable[[Lookup, Tensor], Tensor], total: Tensor) -> Tensor:
        def watched(weight: Lookup, inputs: Tensor) -> Tensor:
            def looked_up(slot: str) -> Any:
                found = weight(slot)
                tensor = found if isinstance(found, Tensor) else found.value  # type: ignore[union-attr]
                self._gathered[id(tensor)] = tensor
                return found

            out = run(looked_up, inputs)
            self.at_once = max(self.at_once, self.now)
            self.passes += 1
            return out

        return self._in_layer(index, watched, total)

    @property
    def now(self) -> int:
        """Numbers gathered."""
        return sum(t.untyped_storage().size() // t.itemsize for t in self._gathered.values())


def measure(job: JobSpec) -> dict[str, Any]:
    """One update at a rate of zero."""
    files = resolve(job.model)
    config, platform = load_config(files), platforms.detect("cpu", threads=1)
    home = load_base(job, files, config, platform=platform, precision=Precision.FLOAT32)
    watch = Watch(home) if isinstance(home, ShardedHome) else None
    policy = Recompute(job.recompute if job.recompute != "auto" else "none")
    subject = make_subject(job, home, files, precision=Precision.FLOAT32, recompute=policy)
    optimiser = Optimiser(subject.parameters, AdamW())
    learner = Learner(subject.training, subject.parameters, optimiser, max_grad_norm=None)
    rows = load_dataset(job.dataset, load_tokenizer(files), context=512, seed=job.seed)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    packs = microbatches(rows.step_rows(0, seed=0, batch_size=5), job.micro_tokens, rank=rank, world=world)
    assert len(packs) > 1
    update = learner.update([pack_batch(pack, platform.device) for pack in packs], step=0, rate=0.0)
    parameters = subject.parameters
    gradients = {item.name: parameters.gathered(item.name, item.trained.grad).clone() for item in parameters}
    if watch is None:
        held = sum(slot.numel() for name, slot in home.decoder.named_buffers() if name != "rotations")
        watched = {}
    else:
        assert isinstance(home, ShardedHome)
        held = sum(shard.local.numel() for shard in home.shards.values())
        layer = sum(s.shape.numel() for name, s in home.shards.items() if name.startswith("layers.0."))
        watched = {
            "gathered_at_once": watch.at_once,
            "gathered_after": watch.now,
            "one_layer": layer,
            "passes": watch.passes,
        }
    moments = sum(t.numel() for state in optimiser._adamw.state.values() for t in state.values() if t.dim())
    numbers = {"held": held, "summed": parameters.gradients.numel(), "moments": moments, "norm": update.grad_norm}
    return {"gradients": gradients, **numbers, **watched}


if __name__ == "__main__":
    dist.init_process_group("gloo")
    folder = Path(sys.argv[1])
    jobs = json.loads((folder / "measure.json").read_text())
    found = {name: measure(make_spec(told)) for name, told in jobs.items()}
    torch.save(found, folder / f"measured.{dist.get_rank()}")
    dist.barrier()  # a rank that left while another was still talking to it aborted once, in gloo's own threads
    dist.destroy_process_group()
    leave_ranks(0)
