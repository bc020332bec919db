"""One update: gradients of all microbatches summed, divided once by the tokens that count, clipped, applied."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from lmesh_kernels.layers.packed_batch import PackedBatch, Segment, pack_batch
from lmesh_kernels.models.parameters import Parameters, ranks
from lmesh_kernels.models.training import TrainingPass
from lmesh_kernels.ops.dropout import Dropout, dropout_keys

from lmesh_trainer.optimiser import Optimiser


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """What one update was made of."""

    loss: float  # mean over the trained tokens, before the update
    accuracy: float  # share of them whose target was the likeliest
    grad_norm: float  # before clipping
    tokens: int  # in the microbatches, over all ranks
    trained_tokens: int  # of them with a weight in the loss
    applied: bool  # False where loss or gradients were not finite: nothing has changed then


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sums:
    loss: float
    correct: float
    weight: float  # sum of the weights: what everything is divided by
    tokens: float
    trained_tokens: float


class Learner:
    """Parameters and what changes them."""

    def __init__(
        self,
        training: TrainingPass,
        parameters: Parameters,
        optimiser: Optimiser,
        *,
        max_grad_norm: float | None,
        dropout: float = 0.0,
        seed: int = 0,
    ) -> None:
        self._training, self._parameters, self._optimiser = training, parameters, optimiser
        self._max_grad_norm, self._dropout, self._seed = max_grad_norm, dropout, seed

    def update(self, batches: Sequence[PackedBatch], *, step: int, rate: float) -> Update:
        """Learns from this rank's microbatches of step `step` at a learning rate; every rank calls it, in step.

        A rank without a microbatch gives an empty sequence. Losses and gradients are sums over tokens, so how rows
        are cut into microbatches and spread over ranks changes the result by rounding only.
        """
        self._parameters.clear()
        sums = self._reduced(self._gather(batches, step))
        gradients = self._parameters.gradients
        if sums.weight:
            gradients.mul_(1.0 / sums.weight)
        norm = self._parameters.norm()
        loss = sums.loss / sums.weight if sums.weight else 0.0
        finite = math.isfinite(norm) and math.isfinite(loss)
        if finite and sums.weight:
            if self._max_grad_norm is not None and norm > self._max_grad_norm:
                # As torch's own clipping, whose small constant keeps the division whole.
                gradients.mul_(self._max_grad_norm / (norm + 1e-6))
            self._optimiser.step(rate)
            self._parameters.publish()
        return Update(
            loss=loss,
            accuracy=sums.correct / max(1.0, sums.trained_tokens),
            grad_norm=norm,
            tokens=round(sums.tokens),
            trained_tokens=round(sums.trained_tokens),
            applied=finite and sums.weight > 0,
        )

    def rehearse(self, batches: Sequence[PackedBatch]) -> None:
        """Runs microbatches as an update would, and leaves everything as it was: parameters, order and randomness."""
        self._gather(batches, 0)
        self._parameters.clear()

    def _gather(self, batches: Sequence[PackedBatch], step: int) -> _Sums:
        loss = correct = weight = trained = 0.0
        for batch in self._in_step(batches):
            sums = self._training.loss(batch, self._dropout_of(batch, step))
            sums.loss.backward()  # type: ignore[no-untyped-call]
            loss += float(sums.loss.detach())
            correct += float(sums.correct)
            weight += float(batch.weights.sum(dtype=torch.float64))
            trained += float(batch.weights.count_nonzero())
        tokens = float(sum(batch.num_tokens for batch in batches))
        return _Sums(loss=loss, correct=correct, weight=weight, tokens=tokens, trained_tokens=trained)

    def _in_step(self, batches: Sequence[PackedBatch]) -> Sequence[PackedBatch]:
        """As many batches as the rank with the most has, where weights are gathered from all ranks for each: those
        that a rank lacks have one token, which counts nothing.
        """
        if not self._training.lockstep:
            return batches
        device = self._parameters.gradients.device
        most = torch.tensor(len(batches), device=device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        idle = pack_batch([Segment(row=0, ids=(0,), weights=(0.0,))], device)
        return [*batches, *[idle] * (int(most) - len(batches))]

    def _dropout_of(self, batch: PackedBatch, step: int) -> Dropout | None:
        if not self._dropout:
            return None
        return Dropout(rate=self._dropout, keys=dropout_keys(self._seed, step, batch.rows, batch.positions))

    def _reduced(self, sums: _Sums, *, gradients: bool = True) -> _Sums:
        """The sums over all ranks, and where asked those of the gradients."""
        if ranks() == 1:
            return sums
        if gradients:
            self._parameters.reduce()
        device = self._parameters.gradients.device
        columns = [sums.loss, sums.correct, sums.weight, sums.tokens, sums.trained_tokens]
        total = torch.tensor(columns, dtype=torch.float64, device=device)
        dist.all_reduce(total)
        loss, correct, weight, tokens, trained = total.tolist()
        return _Sums(loss=loss, correct=correct, weight=weight, tokens=tokens, trained_tokens=trained)

    @torch.no_grad()
    def evaluate(self, batches: Sequence[PackedBatch]) -> tuple[float, float]:
        """(mean loss, accuracy) over this rank's and all other ranks' batches; no dropout."""
        sums = self._reduced(self._evaluated(batches), gradients=False)
        return sums.loss / max(1e-12, sums.weight), sums.correct / max(1.0, sums.trained_tokens)

    def _evaluated(self, batches: Sequence[PackedBatch]) -> _Sums:
        loss = correct = weight = trained = 0.0
        for batch in self._in_step(batches):
            sums = self._training.loss(batch)
            loss += float(sums.loss)
            correct += float(sums.correct)
            weight += float(batch.weights.sum(dtype=torch.float64))
            trained += float(batch.weights.count_nonzero())
        return _Sums(loss=loss, correct=correct, weight=weight, tokens=0.0, trained_tokens=trained)
