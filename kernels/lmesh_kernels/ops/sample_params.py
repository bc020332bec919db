"""What sampling is told of a step's rows: columns on the device, and hints from the host."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

from torch import Tensor

from lmesh_kernels.ops.noise import row_keys


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleParams:
    """Columns of R rows, on the logits' device."""

    temperature: Tensor  # [R] float32; 0: argmax
    top_p: Tensor  # [R] float32; 1: off
    top_k: Tensor  # [R] int32; 0: off
    floor: Tensor  # [R] float32, `score_floor` of min_p
    seed: Tensor  # [R] int64, see seed_to_int64
    choice: Tensor  # [R] int64
    position: Tensor  # [R] int64, absolute position of the token drawn

    def rows(self, index: slice | Tensor) -> SampleParams:
        """The same of some rows."""
        return SampleParams(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    def keys(self) -> Tensor:
        """[R] int64, what each row's noise is a function of."""
        return row_keys(self.seed, self.choice, self.position)


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleHints:
    """What the host knows of a batch's parameters, so that a device need not be asked; the defaults are safe."""

    any_random: bool = True  # some row has a temperature above 0
    any_truncation: bool = True  # some random row has top_p, top_k or min_p set

    @classmethod
    def of(
        cls, temperature: Iterable[float], top_p: Sequence[float], top_k: Sequence[int], min_p: Sequence[float]
    ) -> SampleHints:
        """Hints from the host's copies of the parameters, one value a row."""
        rows = [(t > 0, p < 1 or k > 0 or m > 0) for t, p, k, m in zip(temperature, top_p, top_k, min_p, strict=True)]
        return cls(any_random=any(r for r, _ in rows), any_truncation=any(r and t for r, t in rows))


def seed_to_int64(seed: int) -> int:
    """An unsigned 64-bit seed as the int64 with the same bits, which is what torch holds."""
    seed &= 0xFFFFFFFFFFFFFFFF
    return seed - (1 << 64) if seed >> 63 else seed


def score_floor(min_p: float) -> float:
    """ln(min_p), below which a tempered score lies too far under the best; taken on the host, alike for all devices."""
    return math.log(min_p) if min_p > 0 else -math.inf
