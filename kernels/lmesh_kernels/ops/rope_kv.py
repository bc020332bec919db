"""Between the qkv projection and attention: norm of q and k heads, rotation, and the write into the paged cache."""

from __future__ import annotations

from torch import Tensor

from lmesh_kernels.ops.backend import takes_triton
from lmesh_kernels.ops.rms_norm import rms_norm_reference
from lmesh_kernels.ops.rope import rotate_reference


def rope_kv(
    qkv: Tensor,
    rotation: Tensor,
    kv_slots: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Write this step's K and V into the cache and return the rotated queries.

    qkv [T, (heads + 2 * kv_heads) * head_dim], q then k then v, may be overwritten; rotation [T, head_dim] float32;
    kv_slots [T] int64 (int32 will do on accelerators), all different;
    keys, values [blocks, block_size, kv_heads, head_dim], written in place;
    on an accelerator q and k are left in their places in qkv, normed and rotated, as `attend_prompt` reads them;
    q_norm, k_norm [head_dim]: weights of the norm taken over each head before the rotation, or None.
    Returns q [T, heads, head_dim].
    """
    if takes_triton(qkv):
        from lmesh_kernels.ops.rope_kv_kernels import rope_kv_triton

        return rope_kv_triton(qkv, rotation, kv_slots, keys, values, q_norm, k_norm, eps)
    return rope_kv_reference(qkv, rotation, kv_slots, keys, values, q_norm=q_norm, k_norm=k_norm, eps=eps)


def rope_kv_reference(
    qkv: Tensor,
    rotation: Tensor,
    kv_slots: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """As `rope_kv`, in plain torch."""
    kv_heads, head_dim = keys.shape[-2:]
    heads = qkv.view(qkv.shape[0], -1, head_dim)
    q, k, v = heads[:, : -2 * kv_heads], heads[:, -2 * kv_heads : -kv_heads], heads[:, -kv_heads:]
    if q_norm is not None:
        q, _ = rms_norm_reference(q, q_norm, eps)
    if k_norm is not None:
        k, _ = rms_norm_reference(k, k_norm, eps)
    keys.view(-1, kv_heads, head_dim).index_copy_(0, kv_slots, rotate_reference(k, rotation).to(keys.dtype))
    values.view(-1, kv_heads, head_dim).index_copy_(0, kv_slots, v.to(values.dtype))
    return rotate_reference(q, rotation)
