"""How many tokens an accelerator's step takes, and up to how many it is captured: by the work of a model's layers.

The rates are those of one H200, of which an H100 differs little here: 600 TFLOP/s over a step's products, and 1.1 to
1.4 ms of a slow host to launch a layer's kernels one by one; 0.75 is reckoned with, for most hosts are faster.
"""

from __future__ import annotations

from typing import NamedTuple

from lmesh_kernels.models.config import ModelConfig

_FLOPS_S = 600e12
_LAUNCH_S = 0.75e-3  # of a layer
# Decodes wait for the prompts beside them: such a step should take no longer.
_STEP_S = 0.1
_LONG_STEP, _STEP = 16384, 8192
# Sampling rows of captured steps with prompts, where there may be more: what they add to such a step is little.
MIXED_SAMPLES = 64
_LEAST_CAPTURED, _MOST_CAPTURED = 1024, 4096


class StepSizes(NamedTuple):
    """Tokens of the steps that are captured, ascending."""

    decodes: tuple[int, ...]
    mixed: tuple[int, ...]  # with prompts


def step_tokens(model: ModelConfig, rows: int, *, fast: bool) -> int:
    """Of one step, at most: whole prompts of 8,192, one or two of them, beside a row of every sequence.

    Two where a device that is as `fast` as those needs less than 0.1 s for them. Long steps keep a slow host ahead: 8
    prompts of 8,192 tokens through Qwen3-0.6B, whose steps of 8,192 such a host launched in 38 ms and the device
    computed in 35, took 0.345 s in steps of 8,448 and 0.296 in steps of 16,384.
    """
    long = model.num_layers * _layer_flops(model) * _LONG_STEP / _FLOPS_S
    return (_LONG_STEP if fast and long < _STEP_S else _STEP) + rows


def captured_tokens(model: ModelConfig) -> int:
    """Of the largest step that is worth a graph: with more, the device is busier with a layer than its host is."""
    even = int(_LAUNCH_S * _FLOPS_S / _layer_flops(model))
    return max(_LEAST_CAPTURED, min(_MOST_CAPTURED, even))


def _layer_flops(model: ModelConfig) -> int:
    """Of a layer's products, a token."""
    attention = 2 * (model.q_size + model.kv_size) * model.hidden_size
    return 2 * (attention + 3 * model.intermediate_size * model.hidden_size)
