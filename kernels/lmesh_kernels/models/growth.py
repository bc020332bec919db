"""A larger vocabulary: rows for added tokens, which begin as the mean of the rows that there are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lmesh_kernels.models.config import ModelConfig
from lmesh_kernels.quant.nf4 import Nf4Tensor, dequantise

VOCABULARY_TENSORS = ("model.embed_tokens.weight", "lm_head.weight")


@dataclass(frozen=True, slots=True, kw_only=True)
class Growth:
    """Rows `known` to `known + added` of embedding and head are new; the tokenizer had the ids below."""

    known: int
    added: int

    def config(self, base: ModelConfig) -> ModelConfig:
        """The base's with room for the new rows: checkpoints often have some to spare."""
        return replace(base, vocab_size=max(base.vocab_size, self.known + self.added))

    def rows(self, matrix: Tensor, vocab_size: int) -> Tensor:
        """matrix [V, D] with all of its rows below `known` as they are, a new tensor [vocab_size, D].

        A new row is the mean of those, summed in float32. As an input it is then a word like any other. As an output
        its logit is the mean of all logits, so its probability is at most 1 / `known`, and n new tokens together change
        what the model says by at most log(1 + n / known) nats (Hewitt 2021, "Initializing New Word Embeddings for
        Pretrained Language Models").
        """
        grown = matrix.new_zeros(vocab_size, matrix.shape[1])
        grown[: len(matrix)] = matrix
        known = min(self.known, len(matrix))
        grown[known : self.known + self.added] = matrix[:known].mean(0, dtype=torch.float32).to(matrix.dtype)
        return grown


def grown_tensors(
    tensors: Iterable[tuple[str, Tensor | Nf4Tensor]], growth: Growth, vocab_size: int
) -> Iterator[tuple[str, Tensor | Nf4Tensor]]:
    """A checkpoint's tensors under Hugging Face names, embedding and head with `vocab_size` rows."""
    for name, tensor in tensors:
        if name not in VOCABULARY_TENSORS:
            yield name, tensor
            continue
        matrix = dequantise(tensor, torch.float32) if isinstance(tensor, Nf4Tensor) else tensor
        yield name, growth.rows(matrix, vocab_size)
