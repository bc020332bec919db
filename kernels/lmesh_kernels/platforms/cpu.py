"""The CPU as a platform: one compute thread of its own, so that the host schedules while it computes."""

from __future__ import annotations

import platform as machine
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from lmesh_kernels.platforms.host_memory import (
    host_memory,
    reset_resident_peak,
    resident_peak,
    usable_cores,
)
from lmesh_kernels.platforms.platform import DeviceInfo, Pending, Platform, Stream

T = TypeVar("T")


class CpuPending(Pending[T]):
    """A future of the compute thread."""

    def __init__(self, future: Future[T]) -> None:
        self._future = future

    def result(self) -> T:
        """Wait for the compute thread."""
        return self._future.result()

    def done(self) -> bool:
        """Whether the compute thread has finished this work."""
        return self._future.done()


class CpuStream(Stream):
    """One thread that runs what is submitted, in order."""

    def __init__(self, threads: int) -> None:
        # OpenMP keeps its thread count per calling thread, so the compute thread sets its own.
        self._executor = ThreadPoolExecutor(
            1, thread_name_prefix="cpu-stream", initializer=torch.set_num_threads, initargs=(threads,)
        )

    def submit(self, fn: Callable[[], T]) -> Pending[T]:
        """Queue `fn` for the compute thread."""
        return CpuPending(self._executor.submit(fn))

    def close(self) -> None:
        """Finish what was submitted and end the thread."""
        self._executor.shutdown(wait=True)


class CpuPlatform(Platform):
    """The host's cores and memory, as far as affinity and cgroup let this process use them."""

    name = "cpu"

    def __init__(self, threads: int = 0) -> None:
        self.device = torch.device("cpu")
        self.threads = threads or usable_cores()
        torch.set_num_threads(self.threads)

    def describe(self) -> DeviceInfo:
        """The processor's name, its memory, threads and vector unit."""
        total, free = host_memory()
        capability = torch.backends.cpu.get_cpu_capability()
        return DeviceInfo(
            name=_processor_name(),
            kind="cpu",
            total_bytes=total,
            free_bytes=free,
            notes=(f"threads={self.threads}", f"vector={capability}"),
        )

    def default_dtype(self) -> torch.dtype:
        """float32: right on every CPU; lower precision is a choice."""
        return torch.float32

    def stream(self) -> Stream:
        """A compute thread."""
        return CpuStream(self.threads)

    def staging(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Plain host memory: it is the device's own."""
        return torch.zeros(shape, dtype=dtype)

    def memory_free(self) -> int:
        """Bytes left of the machine or of the tightest cgroup."""
        return host_memory()[1]

    def peak_bytes(self) -> int:
        """The process's resident peak."""
        return resident_peak()

    def reset_peak(self) -> None:
        """Let the kernel forget the resident peak."""
        reset_resident_peak()


def _processor_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return machine.processor() or machine.machine()
