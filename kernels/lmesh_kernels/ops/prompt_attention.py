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
    """`length` rows of q from `first`, whose keys are the first of row `table` of the block tables."""

    first: int
    length: int
    table: int


def takes_prompts(q_dtype: torch.dtype, head_dim: int, device: torch.device) -> bool:
    """Whether prompts go this way on a device."""
    if device.type != "cuda" or torch.version.hip is not None or q_dtype == torch.float32 or head_dim > 128:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


def attend_prompt(
    q: Tensor, keys: Tensor, values: Tensor, tables: Tensor, prompt: Prompt, out: Tensor, *, scale: float
) -> None:
    """Causal attention of a prompt over itself, written to its rows of `out`; shapes as `paged_attention` has them."""
    length, block_size = prompt.length, keys.shape[1]
    more = -length % STEP
    rows = slice(prompt.first, prompt.first + length)
    blocks = tables[prompt.table, : -(-length // block_size)]
    # What fills up comes last, where no real row sees it; zeros, because a masked NaN is still NaN.
    k, v = (
        pad(cache.index_select(0, blocks).flatten(0, 1)[:length], (0, 0, 0, 0, 0, more)).transpose(0, 1)[None]
        for cache in (keys, values)
    )
    queries = pad(q[rows], (0, 0, 0, 0, 0, more)).transpose(0, 1)[None]
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
        attended = scaled_dot_product_attention(queries, k, v, is_causal=True, scale=scale, enable_gqa=True)
    out[rows] = attended[0].transpose(0, 1)[:length]
