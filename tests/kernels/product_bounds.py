"""How far a product may lie from its float64 value, element by element, from the roundings that it is made with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Relative error of one rounding to nearest: half the distance of neighbours.
ROUND = {dtype: torch.finfo(dtype).eps / 2 for dtype in (torch.float32, torch.bfloat16, torch.float16)}


@dataclass(frozen=True)
class Bounded:
    """A float64 value, and what its computed form may be away from it."""

    value: Tensor
    error: Tensor

    def stored(self, dtype: torch.dtype) -> Bounded:
        """Rounded once more; below the dtype's normal range a rounding's error is absolute."""
        tiny = torch.finfo(dtype).tiny
        return Bounded(self.value, self.error + ROUND[dtype] * ((self.value.abs() + self.error) + tiny))

    def admits(self, found: Tensor) -> bool:
        return bool(((found.double() - self.value).abs() <= self.error).all())  # never true of NaN


def product(x: Bounded, weight: Tensor, bias: Tensor | None) -> Bounded:
    """x @ weight.T + bias in float32 sums: n additions in any order err by n * 2^-24 of the sum of sizes, at most."""
    exact = x.value @ weight.double().T
    sizes = (x.value.abs() + x.error) @ weight.double().abs().T
    if bias is not None:
        exact, sizes = exact + bias.double(), sizes + bias.double().abs()
    additions = (weight.shape[1] + 2) * ROUND[torch.float32]
    return Bounded(exact, x.error @ weight.double().abs().T + additions * sizes)


def norm(total: Tensor, weight: Tensor, eps: float) -> Bounded:
    """RMS norm of the sum as stored: rounded to its dtype before the weight and after."""
    wide = total.double()
    value = wide / (wide.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight.double()
    # Half the error of the sum of squares, a root and two products in float32, then two stores.
    relative = (wide.shape[-1] / 2 + 8) * ROUND[torch.float32] + 2.01 * ROUND[total.dtype]
    tiny = torch.finfo(total.dtype).tiny * (1 + weight.double().abs())
    return Bounded(value, relative * value.abs() + tiny)


def gated(both: Bounded) -> Bounded:
    """silu(gate) * up of [T, 2 * I] in float32: silu's slope is 1.1 at most, its own error a few roundings."""
    gate, up = both.value.chunk(2, dim=-1)
    gate_error, up_error = both.error.chunk(2, dim=-1)
    activated = torch.nn.functional.silu(gate)
    # exp's argument is in error by a rounding of itself, which is one of its value for each unit.
    own = (8 + gate.abs()) * ROUND[torch.float32] * (activated.abs() + 1e-30)
    activated_error = 1.1 * gate_error + own
    error = activated_error * (up.abs() + up_error) + activated.abs() * up_error
    return Bounded(activated * up, error + 2 * ROUND[torch.float32] * (activated * up).abs())


def exactly(x: Tensor) -> Bounded:
    return Bounded(x.double(), torch.zeros_like(x, dtype=torch.float64))


def draw(*shape: int, dtype: torch.dtype, device: str, seed: int) -> Tensor:
    """Normal, and the same wherever it is."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(device, dtype)


def poison(*shape: int, like: Tensor) -> Tensor:
    return like.new_full(shape, float("nan"))
