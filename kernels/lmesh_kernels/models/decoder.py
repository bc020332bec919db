"""One decoder for every supported family: what differs between them is in `ModelConfig`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lmesh_kernels.layers.attention import PagedAttention, SelfAttention
from lmesh_kernels.layers.batch import PagedBatch
from lmesh_kernels.layers.linear import Linear
from lmesh_kernels.layers.mlp import MLP
from lmesh_kernels.layers.norm import RMSNorm
from lmesh_kernels.models.arena import lay_out
from lmesh_kernels.models.config import ModelConfig, Quantisation
from lmesh_kernels.ops.embedding import embed, embed_pending, vocabulary_logits
from lmesh_kernels.ops.linear import pack
from lmesh_kernels.ops.rope import rope_table


class Vocabulary(nn.Module):
    """A vocabulary matrix [vocab, hidden]."""

    weight: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.register_buffer("weight", torch.empty(config.vocab_size, config.hidden_size, device="meta"))


class DecoderLayer(nn.Module):
    """Pre-norm attention and MLP on a residual stream."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = SelfAttention(config, layer)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None,
        rotation: Tensor,
        batch: PagedBatch,
        attention: PagedAttention,
        rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Returns (this layer's last addition [T, hidden], the residual stream before it), of `rows` alone if given."""
        norm = self.attention_norm
        attended, residual = self.attention.after_norm(x, residual, norm, rotation, batch, attention, rows)
        return self.mlp.after_norm(attended, residual, self.mlp_norm, batch.adapters)


class Decoder(nn.Module):
    """A causal language model for inference; weights are uninitialised until `models.weights` fills them.

    All weights are buffers, views into one allocation (`arena`) whose addresses never change; those of the layers'
    products may be held quantised instead, beside it.
    """

    rotations: Tensor

    def __init__(
        self, config: ModelConfig, *, dtype: torch.dtype, device: torch.device, quantisation: Quantisation = "none"
    ) -> None:
        super().__init__()
        self.config = config
        self.dtype = dtype
        self.quantisation = quantisation
        self.embedding = Vocabulary(config)
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = None if config.tie_word_embeddings else Vocabulary(config)
        for name, module in self.named_modules():
            if isinstance(module, Linear):
                module.slot = name
                if quantisation == "nf4":
                    module.quantise(dtype, device)
        self.arena = lay_out(self, dtype, device)
        table = rope_table(config.rope, config.head_dim, config.max_position_embeddings)
        self.register_buffer("rotations", table.to(device), persistent=False)
        self._packed_head: Tensor | None = None
        self._batch_invariant = False

    def pack(self) -> None:
        """Copies the weights of all products into the fastest layout of their device; they must be loaded.

        Costs `footprint.packed_bytes` more. A swap of weights in the arena must be followed by another `pack`.
        """
        for module in self.modules():
            if isinstance(module, Linear):
                module.pack()
        self._packed_head = pack(self._head_weight)

    def fix_bits(self) -> None:
        """From now on a row's bits do not depend on what else is in its batch: 16-bit weights on a CUDA device only.

        Attention must be told as well (`PagedAttention`). Adapters' products are not covered.
        """
        self._batch_invariant = True
        for module in self.modules():
            if isinstance(module, Linear):
                module.batch_invariant = True

    def product(self, name: str) -> Linear:
        """The product of that name, such as layers.3.attention.qkv."""
        module = self.get_submodule(name)
        assert isinstance(module, Linear)
        return module

    @property
    def _head_weight(self) -> Tensor:
        return (self.embedding if self.head is None else self.head).weight

    def forward(self, batch: PagedBatch, attention: PagedAttention, rows: Tensor | None = None) -> Tensor:
        """Run one step's tokens, writing their K and V into the attention's cache.

        Returns [T, hidden] after the last norm, or [R, hidden] of `rows` [R], all else of which the last layer then
        leaves out: of a prompt that is most of a layer's work.
        """
        attention.prepare(batch, self.dtype)
        rotation = self.rotations.index_select(0, batch.positions)
        weight, pending = self.embedding.weight, batch.pending
        if pending is None:
            x = embed(batch.ids, weight)
        else:
            x = embed_pending(batch.ids, pending.slots, pending.last_ids, weight)
        residual: Tensor | None = None
        early = None if batch.adapters else rows  # adapters' tiles are those of all rows
        last = len(self.layers) - 1
        for number, layer in enumerate(self.layers):
            x, residual = layer(x, residual, rotation, batch, attention, early if number == last else None)
        hidden = self.norm.forward(x, residual)[0]
        return hidden if rows is None or early is not None else hidden.index_select(0, rows)

    def logits(self, hidden: Tensor, *, widened: bool = True, out: Tensor | None = None) -> Tensor:
        """Logits [R, vocab] of the rows asked for, hidden [R, hidden]: float32, or in the model's own dtype.

        `out` is as `vocabulary_logits` has it.
        """
        return vocabulary_logits(
            hidden,
            self._head_weight,
            self._packed_head,
            widened=widened,
            out=out,
            batch_invariant=self._batch_invariant,
        )
