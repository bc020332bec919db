"""NVIDIA GPUs: work goes to a side stream, an event says when it is done, staging memory is pinned."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from lmesh_kernels.platforms.platform import DeviceInfo, Kind, Pending, Platform, Stream

T = TypeVar("T")


class EventPending(Pending[T]):
    """A value made by launches that an event follows."""

    def __init__(self, value: T, event: torch.cuda.Event) -> None:
        self._value = value
        self._event = event

    def result(self) -> T:
        """Wait for the event; other host threads run meanwhile."""
        self._event.synchronize()
        return self._value

    def done(self) -> bool:
        """Whether the device has passed the event."""
        return bool(self._event.query())  # type: ignore[no-untyped-call]


class FailedPending(Pending[T]):
    """Work whose launch raised on the host."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def result(self) -> T:
        """Raise what the function raised."""
        raise self._error

    def done(self) -> bool:
        """Always: nothing is running."""
        return True


class CudaStream(Stream):
    """A side stream. The host enqueues launches at once; the device runs them in order."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device=device)  # type: ignore[no-untyped-call]
        # What was made on the default stream before (weights, KV) must be there when this stream reads it.
        self._stream.wait_stream(torch.cuda.current_stream(device))

    def submit(self, fn: Callable[[], T]) -> Pending[T]:
        """Enqueue what `fn` launches; a device-to-host copy in it is complete when the result is taken."""
        with torch.cuda.stream(self._stream):
            try:
                value = fn()
            except Exception as error:  # noqa: BLE001 - re-raised by result(), as on a stream that runs later
                return FailedPending(error)
            # Blocking events let the host thread sleep instead of spinning beside the other processes.
            event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            event.record(self._stream)
        return EventPending(value, event)

    def close(self) -> None:
        """Wait for the device to finish what was enqueued."""
        self._stream.synchronize()


class CudaPlatform(Platform):
    """One CUDA device, the process's first visible one unless told otherwise."""

    name: Kind = "cuda"
    supports_graphs = True

    def __init__(self, index: int = 0) -> None:
        self.device = torch.device("cuda", index)
        torch.cuda.set_device(self.device)

    def describe(self) -> DeviceInfo:
        """Name, memory and compute capability as the driver gives them."""
        properties = torch.cuda.get_device_properties(self.device)
        free, total = torch.cuda.mem_get_info(self.device)
        return DeviceInfo(
            name=properties.name,
            kind=self.name,
            total_bytes=total,
            free_bytes=free,
            compute_capability=(properties.major, properties.minor),
            notes=(f"multiprocessors={properties.multi_processor_count}",),
        )

    def default_dtype(self) -> torch.dtype:
        """bfloat16 where the hardware has it (capability 8.0 and on), else float16."""
        return torch.bfloat16 if torch.cuda.get_device_capability(self.device) >= (8, 0) else torch.float16

    def stream(self) -> Stream:
        """A side stream."""
        return CudaStream(self.device)

    def staging(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Pinned host memory: copies from it do not block the host."""
        return torch.zeros(shape, dtype=dtype, pin_memory=True)

    def memory_free(self) -> int:
        """Bytes the driver has free plus what torch's allocator holds unused."""
        free, _ = torch.cuda.mem_get_info(self.device)
        unused = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return int(free + unused)

    def peak_bytes(self) -> int:
        """Most bytes torch's allocator had handed out at once."""
        return int(torch.cuda.max_memory_allocated(self.device))

    def reset_peak(self) -> None:
        """Start the allocator's peak anew."""
        torch.cuda.reset_peak_memory_stats(self.device)
