"""The decoder's training pass: the weights, layers and order of `Decoder`, in nodes that keep little."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from lmesh_kernels.layers.packed_batch import PackedBatch
from lmesh_kernels.layers.recompute import Recompute, run_again
from lmesh_kernels.models.decoder import Decoder
from lmesh_kernels.models.home import Home, Lookup, ResidentHome
from lmesh_kernels.ops.attn_out import attn_out_train
from lmesh_kernels.ops.dropout import Dropout
from lmesh_kernels.ops.embedding import embed_train
from lmesh_kernels.ops.head_loss import CHUNK_BYTES, LossSums, head_loss
from lmesh_kernels.ops.low_rank import LowRank
from lmesh_kernels.ops.mlp import mlp_train
from lmesh_kernels.ops.packed_attention import Heads, packed_attention
from lmesh_kernels.ops.product import Product
from lmesh_kernels.ops.qkv import qkv_train
from lmesh_kernels.ops.rms_norm import rms_norm_train
from lmesh_kernels.ops.trained import Trained, Weight


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Layer:
    """One layer's weights as its nodes read them."""

    attention_norm: Weight
    qkv: Product
    q_norm: Weight | None
    k_norm: Weight | None
    out: Product
    mlp_norm: Weight
    gate_up: Product
    down: Product

    def with_dropout(self, dropout: Dropout) -> _Layer:
        """The same, for one step."""
        changed = {name: replace(getattr(self, name), dropout=dropout) for name in ("qkv", "out", "gate_up", "down")}
        return replace(self, **changed)


class TrainingPass:
    """Loss and gradients of a decoder over packed rows.

    `adapters` are added to fused products, by the name of their module ("layers.3.attention.qkv"). Gradients go to
    the sums that `Trained` holds: an adapter's, and those of weights that are themselves trained. Only one thread may
    use it.
    """

    def __init__(
        self,
        home: Home | Decoder,
        *,
        trained: Mapping[str, Trained] | None = None,
        adapters: Mapping[str, LowRank] | None = None,
        recompute: Recompute = Recompute.NONE,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        """A decoder is one whose weights are all here; `trained` are then the slots of it that are trained."""
        self._home: Home = ResidentHome(home, trained) if isinstance(home, Decoder) else home
        self._decoder, self._recompute, self._chunk_bytes = self._home.decoder, recompute, chunk_bytes
        self._adapters = dict(adapters or {})
        config = self._decoder.config
        self._heads = Heads(heads=config.num_heads, kv_heads=config.num_kv_heads, head_dim=config.head_dim)
        self._eps = config.rms_norm_eps

    @property
    def lockstep(self) -> bool:
        """Whether every rank must run as many batches as every other."""
        return self._home.lockstep

    def _product(self, name: str, weight: Lookup) -> Product:
        module = self._decoder.product(name)
        bias = None if module.bias is None else weight(f"{name}.bias")
        return Product(weight=module.quantised or weight(f"{name}.weight"), bias=bias, low=self._adapters.get(name))

    def _layer(self, name: str, weight: Lookup) -> _Layer:
        normed = self._decoder.config.qk_norm
        return _Layer(
            attention_norm=weight(f"{name}.attention_norm.weight"),
            qkv=self._product(f"{name}.attention.qkv", weight),
            q_norm=weight(f"{name}.attention.q_norm.weight") if normed else None,
            k_norm=weight(f"{name}.attention.k_norm.weight") if normed else None,
            out=self._product(f"{name}.attention.out", weight),
            mlp_norm=weight(f"{name}.mlp_norm.weight"),
            gate_up=self._product(f"{name}.mlp.gate_up", weight),
            down=self._product(f"{name}.mlp.down", weight),
        )

    def hidden(self, batch: PackedBatch, dropout: Dropout | None = None) -> Tensor:
        """[T, hidden] after the last norm."""
        return self._home.whole(lambda weight: (self._hidden(batch, dropout, weight),))[0]

    def _hidden(self, batch: PackedBatch, dropout: Dropout | None, weight: Lookup) -> Tensor:
        rotation = self._home.rotations.index_select(0, batch.positions)
        total = embed_train(batch.ids, weight("embedding.weight"))
        for index in range(self._decoder.config.num_layers):
            run = partial(self._run, index, dropout, rotation, batch)
            total = self._home.in_layer(index, run, total)
        return rms_norm_train(total, weight("norm.weight"), self._eps)

    def loss(self, batch: PackedBatch, dropout: Dropout | None = None) -> LossSums:
        """The sums over the batch; `.loss.backward()` adds the gradients of the sum."""
        head = "embedding.weight" if self._decoder.head is None else "head.weight"

        def run(weight: Lookup) -> tuple[Tensor, ...]:
            hidden = self._hidden(batch, dropout, weight)
            sums = head_loss(hidden, weight(head), batch.targets, batch.weights, chunk_bytes=self._chunk_bytes)
            return sums.loss, sums.correct

        loss, correct = self._home.whole(run)
        return LossSums(loss, correct)

    @torch.no_grad()
    def logprobs(self, batch: PackedBatch) -> Tensor:
        """Log-probabilities [T] float32 of `batch.targets` under a resident model; a last token's means nothing."""
        hidden = self.hidden(batch)
        rows = max(1, self._chunk_bytes // (4 * self._decoder.config.vocab_size))
        found = []
        for at in range(0, batch.num_tokens, rows):
            logits = self._decoder.logits(hidden[at : at + rows])
            chosen = logits.gather(1, batch.targets[at : at + rows, None])[:, 0]
            found.append(chosen - torch.logsumexp(logits, dim=-1))
        return torch.cat(found)

    def _run(
        self,
        index: int,
        dropout: Dropout | None,
        rotation: Tensor,
        batch: PackedBatch,
        weight: Lookup,
        total: Tensor,
    ) -> Tensor:
        layer = self._layer(f"layers.{index}", weight)
        if dropout is not None:
            layer = layer.with_dropout(dropout)
        attention, mlp = partial(self._attention, layer, rotation, batch), partial(self._mlp, layer)
        match self._recompute:
            case Recompute.NONE:
                return mlp(attention(total))
            case Recompute.SELECTIVE:
                return run_again(mlp, attention(total))
            case Recompute.FULL | Recompute.OFFLOAD:
                to_host = self._recompute is Recompute.OFFLOAD
                return run_again(lambda x: mlp(attention(x)), total, to_host=to_host)

    def _attention(self, layer: _Layer, rotation: Tensor, batch: PackedBatch, total: Tensor) -> Tensor:
        qkv = qkv_train(total, layer.attention_norm, self._eps, layer.qkv)
        if layer.q_norm is not None and layer.k_norm is not None:
            qkv = self._head_norms(qkv, layer.q_norm, layer.k_norm)
        return attn_out_train(packed_attention(qkv, rotation, batch, self._heads), total, layer.out)

    def _head_norms(self, qkv: Tensor, q_norm: Weight, k_norm: Weight) -> Tensor:
        heads = self._heads
        kv_size = heads.kv_heads * heads.head_dim
        q, k, v = torch.split(qkv, [heads.q_size, kv_size, kv_size], dim=1)
        q, k = (
            rms_norm_train(x.reshape(x.shape[0], -1, heads.head_dim), norm, self._eps).flatten(1)
            for x, norm in ((q, q_norm), (k, k_norm))
        )
        return torch.cat([q, k, v], dim=1)

    def _mlp(self, layer: _Layer, total: Tensor) -> Tensor:
        return mlp_train(total, layer.mlp_norm, self._eps, layer.gate_up, layer.down)
