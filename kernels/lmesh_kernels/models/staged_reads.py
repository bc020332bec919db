"""Tensors from files straight to a device: threads read into pinned memory while earlier pieces are being copied."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from lmesh_kernels.models.safetensors_folder import StoredTensor, WeightsError
from lmesh_kernels.platforms.platform import Pending, Platform, Stream

THREADS = 8
PIECE_BYTES = 8 << 20
"""A thread has two pieces of staging memory at most, so 128 MiB are pinned in all: pinning costs time by the byte.

2.47 GB in the page cache to an H200: 13.1 GB/s with 4 threads, 13.5-16.8 with 8, 13.9 with 16; 5.1 as a mapping.
"""


@dataclass(frozen=True, slots=True)
class _Piece:
    """Bytes of a file and the elements [begin, end) of a flat target that they are."""

    stored: StoredTensor
    target: Tensor
    begin: int
    end: int


class StagedReads:
    """Reads that run beside their caller; leaving the `with` block waits for all, and raises the first that failed.

    Targets must be contiguous and hold as many elements as what is read into them; their dtype may differ.
    """

    def __init__(self, platform: Platform, *, threads: int = THREADS, piece_bytes: int = PIECE_BYTES) -> None:
        self._platform = platform
        self._piece_bytes = piece_bytes
        self._pieces: queue.Queue[_Piece | None] = queue.Queue()
        self._errors: list[Exception] = []
        self._threads = [threading.Thread(target=self._work, name=f"weights-{i}", daemon=True) for i in range(threads)]

    def __enter__(self) -> StagedReads:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:
            self._give_up()
        for _ in self._threads:
            self._pieces.put(None)
        for thread in self._threads:
            thread.join()
        if kind is None and self._errors:
            raise self._errors[0]

    def read(self, stored: StoredTensor, target: Tensor) -> None:
        """Has a tensor read into `target`, of the same number of elements; returns before it is there."""
        flat = target.view(-1)
        step = max(1, self._piece_bytes // stored.dtype.itemsize)
        for begin in range(0, flat.numel(), step):
            self._pieces.put(_Piece(stored, flat, begin, min(begin + step, flat.numel())))

    def wait(self) -> None:
        """Waits until all that was asked for so far is on the device. Raises the first error."""
        self._pieces.join()
        if self._errors:
            raise self._errors[0]

    def _give_up(self) -> None:
        """Nobody wants the rest: what is queued is dropped."""
        while True:
            try:
                self._pieces.get_nowait()
            except queue.Empty:
                return
            self._pieces.task_done()

    def _work(self) -> None:
        try:
            lane = _Lane(self._platform, self._pieces.task_done)
        except Exception as error:  # noqa: BLE001 - raised again by whoever waits
            self._errors.append(error)
            lane = None
        while (piece := self._next(lane)) is not None:
            if self._errors or lane is None:
                self._pieces.task_done()  # dropped: the loading has failed
            else:
                self._try(partial(lane.bring, piece))
        if lane is not None:
            self._try(lane.close)

    def _next(self, lane: _Lane | None) -> _Piece | None:
        """The next piece, or None at the end. Before this thread sleeps its copies are waited for."""
        try:
            return self._pieces.get_nowait()
        except queue.Empty:
            if lane is not None:
                self._try(lane.settle)
            return self._pieces.get()

    def _try(self, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:  # noqa: BLE001 - raised again by whoever waits
            self._errors.append(error)


class _Lane:
    """One thread's files, its stream, and two buffers: one is read into while the other is being copied.

    `done` is called once for each piece brought, when it is on the device or has failed.
    """

    def __init__(self, platform: Platform, done: Callable[[], None]) -> None:
        self._platform = platform
        self._stream: Stream = platform.stream()
        self._buffers = [torch.empty(0, dtype=torch.uint8)] * 2
        self._copies: list[Pending[None] | None] = [None, None]
        self._files: dict[Path, int] = {}
        self._turn = 0
        self._done = done

    def bring(self, piece: _Piece) -> None:
        """Reads a piece and starts its copy, once the copy before the last has left its buffer."""
        turn, self._turn = self._turn, 1 - self._turn
        try:
            self._settle(turn)
            dtype = piece.stored.dtype
            buffer = self._buffer(turn, (piece.end - piece.begin) * dtype.itemsize)
            self._read(piece.stored, piece.begin * dtype.itemsize, buffer)
            source, target = buffer.view(dtype), piece.target[piece.begin : piece.end]
            self._copies[turn] = self._stream.submit(lambda: _copy(source, target))
        except BaseException:
            self._done()
            raise

    def _buffer(self, turn: int, count: int) -> Tensor:
        """Staging memory of `count` bytes; a small model pins little."""
        if len(self._buffers[turn]) < count:
            self._buffers[turn] = self._platform.staging((count,), torch.uint8)
        return self._buffers[turn][:count]

    def settle(self) -> None:
        """Waits for the copies under way."""
        for turn in (self._turn, 1 - self._turn):
            self._settle(turn)

    def _settle(self, turn: int) -> None:
        pending, self._copies[turn] = self._copies[turn], None
        if pending is None:
            return
        try:
            pending.result()
        finally:
            self._done()

    def _read(self, stored: StoredTensor, at: int, buffer: Tensor) -> None:
        if stored.path not in self._files:
            self._files[stored.path] = os.open(stored.path, os.O_RDONLY)
        view, filled = buffer.numpy().data, 0
        while filled < len(view):
            got = os.preadv(self._files[stored.path], [view[filled:]], stored.offset + at + filled)
            if got == 0:
                raise WeightsError("BAD_SAFETENSORS", f"{stored.path.name} became shorter while it was read")
            filled += got

    def close(self) -> None:
        """Waits for the copies under way and closes the files."""
        try:
            self.settle()
            self._stream.close()
        finally:
            for descriptor in self._files.values():
                os.close(descriptor)


@torch.no_grad()
def _copy(source: Tensor, target: Tensor) -> None:
    # The cast happens on the device: the host moves the bytes of the file, no more.
    there = source if source.dtype == target.dtype else source.to(target.device, non_blocking=True)
    target.copy_(there, non_blocking=True)
