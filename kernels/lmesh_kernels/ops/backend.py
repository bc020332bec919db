"""Which form of an op a tensor's device takes: Triton's on accelerators, plain torch on a CPU."""

from __future__ import annotations

from torch import Tensor


def takes_triton(x: Tensor) -> bool:
    """Whether the ops' Triton forms run where `x` lies."""
    return x.device.type in ("cuda", "xpu")  # ROCm's devices are called cuda, too
