"""Self-attention of one layer, and the paged backend that is injected into it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lmesh_kernels.layers.batch import PagedBatch
from lmesh_kernels.layers.kv_cache import KVCache
from lmesh_kernels.layers.linear import Linear
from lmesh_kernels.layers.norm import RMSNorm
from lmesh_kernels.models.config import ModelConfig
from lmesh_kernels.ops.attention_plan import AttentionPlan, plan_attention
from lmesh_kernels.ops.attention_work import AttentionWork
from lmesh_kernels.ops.backend import takes_triton
from lmesh_kernels.ops.device_attention import DeviceAttention
from lmesh_kernels.ops.paged_attention import paged_attention
from lmesh_kernels.ops.rope_kv import rope_kv


class PagedAttention:
    """Attention over a paged KV cache; one engine's, used by all layers of its model."""

    def __init__(self, kv: KVCache, *, invariant: bool = False) -> None:
        self.kv = kv
        self._plan: AttentionPlan | None = None
        self._work: AttentionWork | None = None
        self.device: DeviceAttention | None = None
        if takes_triton(kv.data):
            kv_heads, head_dim = kv.data.shape[-2:]
            self.device = DeviceAttention(
                kv.data.device,
                kv_heads=kv_heads,
                group=kv.group,
                head_dim=head_dim,
                dtype=kv.data.dtype,
                invariant=invariant,
            )

    def prepare(self, batch: PagedBatch, dtype: torch.dtype) -> None:
        """Cut the step up once; every layer's `attend` uses it. The decoder's forward calls this first."""
        if self.device is not None:
            self._work = batch.work or self.device.plan(batch)
            return
        keys, _ = self.kv.layer(0)
        token_bytes = 2 * keys.shape[2] * keys.shape[3] * keys.dtype.itemsize
        self._plan = plan_attention(batch, block_size=self.kv.block_size, token_bytes=token_bytes, dtype=dtype)

    def attend(
        self,
        layer: int,
        qkv: Tensor,
        rotation: Tensor,
        batch: PagedBatch,
        *,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        eps: float,
    ) -> Tensor:
        """Write all of the step's K and V of this layer, then attend: sequences may read each other's new blocks.

        Only work that is `alone`, in which none does so, is written and attended to in one.
        qkv [T, (heads + 2 * kv_heads) * head_dim], rotation [T, head_dim]; returns [T, heads * head_dim].
        """
        keys, values = self.kv.layer(layer)
        if self.device is not None and self._work is not None and self._work.alone:
            return self.device.decode(
                qkv,
                rotation,
                batch.kv_slots,
                keys,
                values,
                batch.block_tables,
                self._work,
                q_norm=q_norm,
                k_norm=k_norm,
                eps=eps,
                scale=keys.shape[-1] ** -0.5,
            ).flatten(1)
        q = rope_kv(qkv, rotation, batch.kv_slots, keys, values, q_norm=q_norm, k_norm=k_norm, eps=eps)
        if self.device is not None and self._work is not None:
            own = qkv.view(len(qkv), -1, q.shape[-1])[:, q.shape[1] :].chunk(2, dim=1)
            return self.device.attend(
                q, keys, values, batch.block_tables, self._work, scale=q.shape[-1] ** -0.5, own=(own[0], own[1])
            ).flatten(1)
        return paged_attention(q, keys, values, batch, scale=q.shape[-1] ** -0.5, plan=self._plan).flatten(1)


class HeadNorm(nn.Module):
    """Weights of the norm over each head of q or k."""

    weight: Tensor

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.empty(head_dim, device="meta"))


class SelfAttention(nn.Module):
    """Fused qkv projection, the injected backend, and the output projection."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.eps = config.rms_norm_eps
        self.qkv = Linear(config.hidden_size, config.q_size + 2 * config.kv_size, bias=config.attention_bias)
        self.out = Linear(config.q_size, config.hidden_size, bias=config.output_bias)
        self.q_norm = HeadNorm(config.head_dim) if config.qk_norm else None
        self.k_norm = HeadNorm(config.head_dim) if config.qk_norm else None

    def after_norm(
        self,
        x: Tensor,
        residual: Tensor | None,
        norm: RMSNorm,
        rotation: Tensor,
        batch: PagedBatch,
        attention: PagedAttention,
        rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The block on norm(x + residual) [T, hidden], and x + residual; rotation [T, head_dim].

        With `rows` [R], where no row has an adapter, both are of those alone, [R, hidden]; K and V are written of all.
        """
        qkv, total = self.qkv.after_norm(x, residual, norm, batch.adapters)
        attended = attention.attend(
            self.layer,
            qkv,
            rotation,
            batch,
            q_norm=self.q_norm.weight if self.q_norm is not None else None,
            k_norm=self.k_norm.weight if self.k_norm is not None else None,
            eps=self.eps,
        )
        if rows is not None:
            attended, total = attended.index_select(0, rows), total.index_select(0, rows)
        return self.out.forward(attended, batch.adapters), total
