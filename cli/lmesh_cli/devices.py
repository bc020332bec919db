"""Shares one machine between several workers: GPUs, memory and threads."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

# Of the free memory, over all workers that share it: a CPU's belongs to the rest of the machine too.
_CPU_FRACTION, _GPU_FRACTION = 0.8, 0.9
_NVIDIA_GPUS = Path("/proc/driver/nvidia/gpus")


def visible_gpus(environ: Mapping[str, str], listing: Path = _NVIDIA_GPUS) -> list[str]:
    """NVIDIA GPUs that workers may use, as CUDA_VISIBLE_DEVICES names them; found without loading any driver."""
    if environ.get("LMESH_WORKER_DEVICE", "auto") == "cpu":
        return []
    if "CUDA_VISIBLE_DEVICES" in environ:
        return [name.strip() for name in environ["CUDA_VISIBLE_DEVICES"].split(",") if name.strip() not in ("", "-1")]
    return [str(index) for index in range(len(list(listing.iterdir())))] if listing.is_dir() else []


def share_of_machine(
    count: int, environ: Mapping[str, str], gpus: list[str] | None = None, cores: int | None = None
) -> list[dict[str, str]]:
    """For each of `count` workers the variables that keep it from taking what belongs to the others.

    A lone worker gets none. GPUs go round; workers that share a GPU, or the CPU, share its memory and threads evenly.
    What the user set stays.
    """
    if count == 1:
        return [{}]
    names = visible_gpus(environ) if gpus is None else gpus
    if names:
        return [_gpu_share(index, count, names, environ) for index in range(count)]
    threads = max(1, (cores or _usable_cores()) // count)
    share = {
        "LMESH_WORKER_THREADS": str(threads),
        "LMESH_WORKER_MEMORY_FRACTION": f"{_CPU_FRACTION / count:.3f}",
    }
    return [_unset(share, environ) for _ in range(count)]


def gpus_for_trainers(
    count: int, workers: int, environ: Mapping[str, str], gpus: list[str] | None = None
) -> list[dict[str, str]]:
    """For each of `count` trainers the GPU that it sees: those that no worker has first; nothing without GPUs."""
    names = visible_gpus(environ) if gpus is None else gpus
    # A lone worker sees all, and takes the first.
    return [{"CUDA_VISIBLE_DEVICES": names[(workers + index) % len(names)]} if names else {} for index in range(count)]


def _usable_cores() -> int:
    """Those that this process, and so its workers, may run on: a container or `taskset` may leave it few."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def _gpu_share(index: int, count: int, names: list[str], environ: Mapping[str, str]) -> dict[str, str]:
    mine = index % len(names)
    sharers = len(range(mine, count, len(names)))
    fraction = {"LMESH_WORKER_MEMORY_FRACTION": f"{_GPU_FRACTION / sharers:.3f}"} if sharers > 1 else {}
    return {"CUDA_VISIBLE_DEVICES": names[mine], **_unset(fraction, environ)}


def _unset(share: Mapping[str, str], environ: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in share.items() if name not in environ}
