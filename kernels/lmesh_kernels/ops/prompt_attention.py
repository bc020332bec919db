"""Attention of a whole prompt, none of it cached before, by torch's own kernels: ahead of ours from about 1,000 tokens.

H200, bfloat16, 8,192 tokens, causal, 32 query and 8 key heads, TFLOP/s: heads of 64: cuDNN 422, ours 359, torch's
FlashAttention-2 269; heads of 128: 603, 376, 318.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

LEAST = 1024  # tokens of a prompt that is worth it
# cuDNN plans each length anew, which takes far longer than the attention: prompts are filled up to one of few.
STEP = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """All tokens of a sequence: `length` rows of the step from `first`."""

    first: int
    length: int


def takes_prompts(q_dtype: torch.dtype, head_dim: int, device: torch.device) -> bool:
    """Whether prompts go this way on a device."""
    if device.type != "cuda" or torch.version.hip is not None or q_dtype == torch.float32 or head_dim > 128:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


def attend_prompt(q: Tensor, k: Tensor, v: Tensor, prompt: Prompt, out: Tensor, *, scale: float) -> None:
    """Causal attention of a prompt over itself, written to its rows of out [T, heads, head_dim].

    q [T, heads, head_dim], k, v [T, kv_heads, head_dim] of all the step's tokens; rows may be apart.
    """
    rows, more = slice(prompt.first, prompt.first + prompt.length), -prompt.length % STEP
    # What fills up comes last, where no real row sees it; zeros, because a masked NaN is still NaN.
    filled = (pad(x[rows], (0, 0, 0, 0, 0, more)) if more else x[rows] for x in (q, k, v))
    queries, k, v = (x.transpose(0, 1)[None] for x in filled)
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
        attended = scaled_dot_product_attention(queries, k, v, is_causal=True, scale=scale, enable_gqa=True)
    out[rows] = attended[0].transpose(0, 1)[: prompt.length]
