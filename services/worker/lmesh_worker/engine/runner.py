"""Runs a planned step on the device: forward, sampling, log-probabilities. Never waits for the device."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import NoReturn

import torch
from lmesh_kernels.layers.attention import PagedAttention
from lmesh_kernels.layers.kv_cache import KVCache
from lmesh_kernels.lora.bank import AdapterBank
from lmesh_kernels.models.decoder import Decoder
from lmesh_kernels.ops.logprobs import token_logprobs
from lmesh_kernels.ops.sample import sample_rows
from lmesh_kernels.platforms.platform import Pending, Platform
from torch import Tensor

from lmesh_worker.engine.buffers import StepBuffers
from lmesh_worker.engine.inputs import PromptScoring, Sampling, StepInputs, build_inputs
from lmesh_worker.engine.logit_tables import LogitTables
from lmesh_worker.engine.plan import StepPlan

Scores = tuple[Tensor, Tensor, Tensor]  # chosen [N], ids of the best [N, k], their log-probabilities [N, k]


@dataclass(slots=True)
class StepResult:
    """Host tensors of one step; valid once the step's `Pending` is done."""

    ids: Tensor  # [R] int64, of the rows that sample, in the plan's order
    finite: Tensor  # [R] bool: False where logits were not finite
    logprobs: dict[int, Scores] = field(default_factory=dict)  # by index among the rows that sample
    prompt_logprobs: dict[int, Scores] = field(default_factory=dict)  # by index among all rows


class Runner:
    """One model on one device, with the buffers that steps are built in."""

    def __init__(
        self,
        decoder: Decoder,
        kv: KVCache,
        platform: Platform,
        *,
        max_tokens: int,
        max_seqs: int,
        max_blocks: int,
        depth: int,
        bank: AdapterBank,
    ) -> None:
        self._decoder, self._platform, self._block_size = decoder, platform, kv.block_size
        self._bank = bank
        self._attention = PagedAttention(kv)
        self._max_seqs = max_seqs
        self._tables = LogitTables(platform, max_seqs=max_seqs, vocab_size=decoder.config.vocab_size)
        self._stream = platform.stream()
        self._sets = [
            StepBuffers(platform, max_tokens=max_tokens, max_seqs=max_seqs, max_blocks=max_blocks)
            for _ in range(depth + 1)
        ]
        self._launched = 0
        # The newest id of every running sequence, so that the next step needs no word from the host.
        self._last_ids = torch.zeros(max_seqs, dtype=torch.int64, device=platform.device)

    def launch(self, plan: StepPlan) -> Pending[StepResult]:
        """Starts a step after those launched before; whatever goes wrong, its result raises it.

        At most depth + 1 may be in flight.
        """
        buffers = self._sets[self._launched % len(self._sets)]
        self._launched += 1
        try:
            inputs = build_inputs(plan, buffers, self._block_size, self._bank, self._tables)
        except Exception as error:  # noqa: BLE001 - a value that no tensor takes is its sequence's fault, as in a step
            return self._stream.submit(partial(_raise, error))
        return self._stream.submit(lambda: self._run(inputs, buffers))

    @torch.inference_mode()
    def _run(self, inputs: StepInputs, buffers: StepBuffers) -> StepResult:
        buffers.upload()
        batch = inputs.batch
        # In place, so that the batch keeps its addresses: ids that the host does not know come from the device.
        known = inputs.token_slots < 0
        batch.ids.copy_(torch.where(known, batch.ids, self._last_ids[inputs.token_slots.clamp(min=0)]))
        hidden = self._decoder.forward(batch, self._attention)
        result = self._sample(hidden, inputs.sampling, inputs.num_samples, buffers)
        for scoring in inputs.prompt_scoring:
            result.prompt_logprobs[scoring.row] = self._score_prompt(hidden, scoring)
        return result

    def _sample(self, hidden: Tensor, sampling: Sampling, count: int, buffers: StepBuffers) -> StepResult:
        result = StepResult(buffers.out_ids[:count], buffers.out_finite[:count])
        if count == 0:
            return result
        logits = self._decoder.logits(hidden.index_select(0, sampling.rows))
        ids = torch.empty(count, dtype=torch.int64, device=logits.device)
        finite = torch.empty(count, dtype=torch.bool, device=logits.device)
        sample_rows(logits, sampling.params, sampling.hints, ids, finite, self._tables.load(sampling.adjusting))
        self._last_ids.index_copy_(0, sampling.slots, ids)
        result.ids.copy_(ids, non_blocking=True)
        result.finite.copy_(finite, non_blocking=True)
        if sampling.alternatives:
            result.logprobs = self._chosen_logprobs(logits, ids, sampling)
        return result

    def _chosen_logprobs(self, logits: Tensor, ids: Tensor, sampling: Sampling) -> dict[int, Scores]:
        """All rows that want them at once, with as many alternatives as the one that wants most."""
        if len(sampling.alternatives) < len(logits):
            logits, ids = logits.index_select(0, sampling.scored), ids.index_select(0, sampling.scored)
        most = max(sampling.alternatives.values())
        chosen, best, values = self._to_host(token_logprobs(logits, ids, most))
        return {
            row: (chosen[i : i + 1], best[i : i + 1, :k], values[i : i + 1, :k])
            for i, (row, k) in enumerate(sampling.alternatives.items())
        }

    def _score_prompt(self, hidden: Tensor, scoring: PromptScoring) -> Scores:
        """Log-probabilities of prompt ids, in pieces no larger than a step's logits were planned to be."""
        rows = hidden[scoring.begin : scoring.begin + len(scoring.targets)]
        pieces = [
            token_logprobs(self._decoder.logits(piece), targets, scoring.alternatives)
            for piece, targets in zip(
                *(torch.split(column, self._max_seqs) for column in (rows, scoring.targets)), strict=True
            )
        ]
        chosen, ids, values = (torch.cat(column) for column in zip(*pieces, strict=True))
        return self._to_host((chosen, ids, values))

    def _to_host(self, scores: Scores) -> Scores:
        """Starts the copies into staging memory; a copy into any other would wait for the device."""
        chosen, ids, values = (
            t if t.device.type == "cpu" else self._platform.staging(tuple(t.shape), t.dtype).copy_(t, non_blocking=True)
            for t in scores
        )
        return chosen, ids, values

    def close(self) -> None:
        """Waits for what was launched and gives the stream back."""
        self._stream.close()


def _raise(error: Exception) -> NoReturn:
    raise error
