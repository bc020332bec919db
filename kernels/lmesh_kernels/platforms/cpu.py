"""The CPU as a platform: it computes where it is asked to."""

from __future__ import annotations

import platform as machine
from collections.abc import Callable
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
    """Work that has been done: its value, or what it raised."""

    def __init__(self, fn: Callable[[], T]) -> None:
        self._error: Exception | None = None
        try:
            self._value = fn()
        except Exception as error:  # noqa: BLE001 - raised again by `result`, whose caller it concerns
            self._error = error

    def result(self) -> T:
        """The value, at once."""
        if self._error is not None:
            raise self._error
        return self._value

    def done(self) -> bool:
        """Always: submitting was doing."""
        return True


class CpuStream(Stream):
    """Runs what is submitted at once: there is no device to be ahead of.

    A compute thread beside the caller's was measured and is slower, 65-76 ms a one-row step of SmolLM2-135M against
    53, and 230-280 ms against 182 with 32 rows (2 AMD EPYC cores): the host's work then takes cores from the products.
    """

    def submit(self, fn: Callable[[], T]) -> Pending[T]:
        """Run `fn` now; what it raises waits in the result."""
        return CpuPending(fn)

    def close(self) -> None:
        """Nothing is left to finish."""


class CpuPlatform(Platform):
    """The host's cores and memory, as far as affinity and cgroup let this process use them."""

    name = "cpu"
    overlaps = False

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
        """The caller's own thread."""
        return CpuStream()

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
