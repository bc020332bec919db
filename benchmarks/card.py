"""What the device itself does, measured in the same run as what is compared with it."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Card:
    """A device's name and its two ceilings."""

    name: str
    copy_tb_s: float  # device to device, bytes read and written
    matmul_tflop_s: float  # of a square product in the dtype measured with

    @property
    def copy_bytes_s(self) -> float:
        """Bytes a second that pass the memory's bus."""
        return self.copy_tb_s * 1e12

    @property
    def flop_s(self) -> float:
        """Floating-point operations a second."""
        return self.matmul_tflop_s * 1e12


def measure_card(device: torch.device) -> Card:
    """8192^3 in bfloat16 and a copy of 2 GiB on an accelerator; 1024^3 in float32 and 256 MiB on a CPU."""
    gpu = device.type != "cpu"
    size, dtype, count = (8192, torch.bfloat16, 2 * _GIB) if gpu else (1024, torch.float32, _GIB // 4)
    copy_s, product_s = _copy_seconds(device, count), _product_seconds(device, size, dtype)
    if gpu:
        torch.cuda.empty_cache()
    return Card(device_name(device), round(2 * count / copy_s / 1e12, 4), round(2 * size**3 / product_s / 1e12, 3))


def _copy_seconds(device: torch.device, count: int) -> float:
    source = torch.empty(count, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    return _seconds(device, lambda: target.copy_(source))


def _product_seconds(device: torch.device, size: int, dtype: torch.dtype) -> float:
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    product = torch.empty_like(a)
    return _seconds(device, lambda: torch.mm(a, b, out=product))


def device_name(device: torch.device) -> str:
    """The maker's name of it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    from lmesh_kernels.platforms.cpu import CpuPlatform

    return CpuPlatform(torch.get_num_threads()).describe().name


def _seconds(device: torch.device, act: Callable[[], object], *, warm: int = 3, runs: int = 10) -> float:
    """Median seconds of one call, by the device's clock where it has one."""
    for _ in range(warm):
        act()
    if device.type != "cuda":
        found = []
        for _ in range(runs):
            begin = time.perf_counter()
            act()
            found.append(time.perf_counter() - begin)
        return statistics.median(found)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(runs + 1)]
    marks[0].record()
    for mark in marks[1:]:
        act()
        mark.record()
    torch.cuda.synchronize(device)
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(marks)) / 1e3
