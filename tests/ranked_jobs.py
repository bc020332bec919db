"""Jobs on several gloo processes, as `python -P ranked_jobs.py FOLDER` under torchrun; what each rank heard comes back.

Each job is a folder below `FOLDER/jobs`, named by a number; all of them run in one call, for processes start slowly.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch.distributed as dist
from lmesh_trainer.messages import Wish
from lmesh_trainer.process import leave_ranks
from lmesh_trainer.spec import JobSpec, read_spec

from tests.training_jobs import After, Heard, run


@dataclass
class Ranked:
    """One rank's word of one job."""

    losses: list[float]
    tokens: list[int]
    outcome: str
    reason: str


def run_ranked(
    folder: Path, jobs: dict[str, JobSpec], *, stop_after: int = 0, world: int = 2
) -> list[dict[str, Ranked]]:
    """Runs jobs by name, in order, each in `folder / name`; of each rank, what it heard."""
    folder.mkdir(parents=True, exist_ok=True)
    told = {name: msgspec.to_builtins(job) for name, job in jobs.items()}
    (folder / "jobs.json").write_text(json.dumps({"stop_after": stop_after, "jobs": told}))
    run_ranks(__file__, folder, world=world)
    found = [json.loads((folder / f"heard.{rank}.json").read_text()) for rank in range(world)]
    return [{name: Ranked(**heard) for name, heard in one.items()} for one in found]


def run_ranks(script: str, *arguments: Path | str, world: int = 2) -> None:
    """Runs a script of the tests under torchrun."""
    root = Path(__file__).resolve().parents[1]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    command = [sys.executable, "-P", *launcher, script, *(str(a) for a in arguments)]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]


def _heard(heard: Heard) -> dict[str, Any]:
    from lmesh_trainer import events

    tokens = [step.num_tokens for step in heard.of(events.StepDone)]
    ended = heard.ended
    return {"losses": heard.losses, "tokens": tokens, "outcome": ended.outcome.value, "reason": ended.reason}


def main(folder: Path) -> None:
    """One rank."""
    dist.init_process_group("gloo")
    told = json.loads((folder / "jobs.json").read_text())
    found = {}
    for name, spec in told["jobs"].items():
        asked = (After(told["stop_after"], Wish.STOP),) if told["stop_after"] else ()
        # The first rank's folder is the job's; another host's has none of its files.
        place = folder / name if dist.get_rank() == 0 else folder / f"{name}.{dist.get_rank()}"
        found[name] = _heard(run(read_spec(json.dumps(spec)), place, *asked))
    (folder / f"heard.{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()  # a rank that left while another was still talking to it aborted once, in gloo's own threads
    dist.destroy_process_group()
    leave_ranks(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
