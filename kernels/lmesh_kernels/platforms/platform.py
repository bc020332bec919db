"""What an engine asks of a device, whatever its maker: memory, dtype, staging, and a stream to run steps on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
Kind = Literal["cpu", "cuda", "rocm", "xpu"]


class PlatformError(RuntimeError):
    """The platform asked for is not on this machine, or its name is not one of ours."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceInfo:
    """One device as found: bytes are those this process may use, `notes` says what was peculiar."""

    name: str
    kind: Kind
    total_bytes: int
    free_bytes: int
    compute_capability: tuple[int, int] | None = None
    notes: tuple[str, ...] = ()


class Pending(ABC, Generic[T]):
    """Work given to a stream and its result."""

    @abstractmethod
    def result(self) -> T:
        """Wait until the device has finished the work; what the function raised is raised here."""

    @abstractmethod
    def done(self) -> bool:
        """Whether `result` would return (or raise) at once."""


class Stream(ABC):
    """An ordered lane of device work: what is submitted first is finished first."""

    @abstractmethod
    def submit(self, fn: Callable[[], T]) -> Pending[T]:
        """Run `fn` on this stream after everything submitted before; returns before the device is done."""

    @abstractmethod
    def close(self) -> None:
        """Finish what was submitted and give the lane back."""


class Platform(ABC):
    """One device. Allocate on `device`; nothing outside this package asks which maker it is."""

    name: Kind
    device: torch.device
    supports_graphs: bool = False
    overlaps: bool = True  # the host can go on while the device computes

    @abstractmethod
    def describe(self) -> DeviceInfo:
        """The device as it is now (free bytes change)."""

    @abstractmethod
    def default_dtype(self) -> torch.dtype:
        """The dtype weights and KV take under `dtype=auto`."""

    @abstractmethod
    def stream(self) -> Stream:
        """A new stream; an engine holds one."""

    @abstractmethod
    def staging(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A zeroed host tensor that copies to the device fast and, where the device can, asynchronously."""

    @abstractmethod
    def memory_free(self) -> int:
        """Bytes that may be allocated now."""

    @abstractmethod
    def peak_bytes(self) -> int:
        """Most bytes in use at once since `reset_peak`."""

    @abstractmethod
    def reset_peak(self) -> None:
        """Start measuring the peak anew."""
