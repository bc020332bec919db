"""The learning rate's course: a pure function of the step."""

from __future__ import annotations

import math
from enum import StrEnum


class Course(StrEnum):
    """What follows the warm-up."""

    CONSTANT = "constant"
    LINEAR = "linear"  # to zero
    COSINE = "cosine"  # half a wave, to zero


def rate_factor(course: Course, step: int, *, warmup_steps: int, total_steps: int) -> float:
    """What the peak rate is multiplied by in step `step`, counted from 0, of `total_steps`; in [0, 1].

    Rises linearly from 0 over the warm-up, as transformers' schedules of the same names do.
    """
    if step < warmup_steps:
        return step / max(1, warmup_steps)
    if course is Course.CONSTANT:
        return 1.0
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return 1.0 - progress if course is Course.LINEAR else 0.5 * (1.0 + math.cos(math.pi * progress))
