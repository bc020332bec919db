"""Intel GPUs, through `torch.xpu`, whose streams and events have CUDA's shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from lmesh_kernels.platforms.platform import DeviceInfo, Pending, Platform, Stream

T = TypeVar("T")


class XpuPending(Pending[T]):
    """What a submitted function made or raised, and the event after it."""

    def __init__(self, value: T | None, error: Exception | None, event: Any) -> None:  # noqa: ANN401 - torch.xpu's
        self._value = value
        self._error = error
        self._event = event

    def result(self) -> T:
        """Wait for the event, then return the value or raise."""
        self._event.synchronize()
        if self._error is not None:
            raise self._error
        return self._value  # type: ignore[return-value]

    def done(self) -> bool:
        """Whether the device has passed the event."""
        return bool(self._event.query())


class XpuStream(Stream):
    """A side stream of an Intel GPU."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.xpu.Stream(device)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.xpu.current_stream(device))

    def submit(self, fn: Callable[[], T]) -> Pending[T]:
        """Enqueue what `fn` launches."""
        value, failure = None, None
        with torch.xpu.stream(self._stream):
            try:
                value = fn()
            except Exception as error:  # noqa: BLE001 - re-raised by result()
                failure = error
            event = torch.xpu.Event()  # type: ignore[no-untyped-call]
            event.record(self._stream)
        return XpuPending(value, failure, event)

    def close(self) -> None:
        """Wait for the device."""
        self._stream.synchronize()


class XpuPlatform(Platform):
    """One Intel GPU."""

    name = "xpu"

    def __init__(self, index: int = 0) -> None:
        self.device = torch.device("xpu", index)

    def describe(self) -> DeviceInfo:
        """Name and memory."""
        properties = torch.xpu.get_device_properties(self.device)
        return DeviceInfo(
            name=properties.name,
            kind="xpu",
            total_bytes=properties.total_memory,
            free_bytes=self.memory_free(),
            notes=("untested on hardware",),
        )

    def default_dtype(self) -> torch.dtype:
        """bfloat16."""
        return torch.bfloat16

    def stream(self) -> Stream:
        """A side stream."""
        return XpuStream(self.device)

    def staging(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Pinned host memory."""
        return torch.zeros(shape, dtype=dtype).pin_memory()

    def memory_free(self) -> int:
        """Bytes of the device that torch's allocator has not reserved: what others use is not seen."""
        total = torch.xpu.get_device_properties(self.device).total_memory
        return int(total - torch.xpu.memory_reserved(self.device))

    def peak_bytes(self) -> int:
        """Most bytes torch's allocator had handed out at once."""
        return int(torch.xpu.max_memory_allocated(self.device))

    def reset_peak(self) -> None:
        """Start the allocator's peak anew."""
        torch.xpu.reset_peak_memory_stats(self.device)
