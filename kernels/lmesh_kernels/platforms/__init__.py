"""Find the device: `detect()` names the best platform of this machine, or the one asked for."""

from __future__ import annotations

import os

import torch

from lmesh_kernels.platforms.cpu import CpuPlatform
from lmesh_kernels.platforms.platform import DeviceInfo, Pending, Platform, PlatformError, Stream

__all__ = ["DeviceInfo", "Pending", "Platform", "PlatformError", "Stream", "available", "detect"]

NAMES = ("cuda", "rocm", "xpu", "cpu")


def available() -> tuple[str, ...]:
    """Names of the platforms this process can use, best first; `cpu` is always the last."""
    found = []
    if torch.cuda.is_available():
        found.append("rocm" if torch.version.hip else "cuda")
    if torch.xpu.is_available():
        found.append("xpu")
    return (*found, "cpu")


def detect(name: str = "auto", *, threads: int = 0) -> Platform:
    """The platform called `name`, or for "auto" the best there is.

    threads: CPU threads to compute with, 0 for as many as this process has physical cores.
    Raises PlatformError where the name is unknown or the machine does not have it.
    """
    present = available()
    chosen = present[0] if name == "auto" else name
    if chosen not in NAMES:
        raise PlatformError(f"device {name!r} is unknown: auto, {', '.join(NAMES)}")
    if chosen not in present:
        raise PlatformError(f"device {name!r} is not usable here: {', '.join(present)}")
    return _open(chosen, threads)


def _open(name: str, threads: int) -> Platform:
    # Accelerator modules are imported only where torch found the accelerator.
    if name == "cuda":
        from lmesh_kernels.platforms.cuda import CudaPlatform

        return CudaPlatform(_local_index())
    if name == "rocm":
        from lmesh_kernels.platforms.rocm import RocmPlatform

        return RocmPlatform(_local_index())
    if name == "xpu":
        from lmesh_kernels.platforms.xpu import XpuPlatform

        return XpuPlatform()
    return CpuPlatform(threads)


def _local_index() -> int:
    """The device of this rank where torchrun started several on one machine, else the first visible one."""
    index = int(os.environ.get("LOCAL_RANK", "0"))
    if index >= torch.cuda.device_count():
        there = f"{torch.cuda.device_count()} GPUs are visible"
        raise PlatformError(f"rank {index} of this machine has no GPU of its own: {there}")
    return index
