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
from lmesh_kernels.platforms.platform import Pending, Platform
from torch import Tensor

from lmesh_worker.engine.compute import Compute, StepOutputs, drawn_views
from lmesh_worker.engine.device_steps import DeviceSteps
from lmesh_worker.engine.graphs import StepGraphs
from lmesh_worker.engine.host_steps import HostSteps
from lmesh_worker.engine.inputs import PromptScoring, StepColumns
from lmesh_worker.engine.logit_tables import LogitTables
from lmesh_worker.engine.plan import StepPlan
from lmesh_worker.engine.slots import Slots

Scores = tuple[Tensor, Tensor, Tensor]  # chosen [N], ids of the best [N, k], their log-probabilities [N, k]


@dataclass(slots=True)
class StepResult:
    """Host tensors of one step; valid once the step's `Pending` is done."""

    ids: Tensor  # [R], of the rows that sample, in the plan's order
    finite: Tensor  # [R] bool: False where logits were not finite
    logprobs: dict[int, Scores] = field(default_factory=dict)  # by index among the rows that sample
    prompt_logprobs: dict[int, Scores] = field(default_factory=dict)  # by index among all rows


class Runner:
    """One model on one device, and what of running sequences is kept there."""

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
        graphs: bool = True,
        invariant: bool = False,
    ) -> None:
        """`kv`'s last block must be nobody's: it takes what rows that fill up a batch write. `invariant`: a row's
        attention does not depend on its batch, as after the decoder's `fix_bits`.
        """
        self._decoder, self._platform, self._max_seqs = decoder, platform, max_seqs
        attention = PagedAttention(kv, invariant=invariant)
        self._slots = Slots(
            platform,
            max_seqs=max_seqs,
            max_blocks=max_blocks,
            spare_block=kv.num_blocks - 1,
            block_size=kv.block_size,
        )
        self.tables = LogitTables(platform, max_seqs=max_seqs, vocab_size=decoder.config.vocab_size)
        self.steps: HostSteps | DeviceSteps
        if attention.device is None:
            self.steps = HostSteps(decoder, attention, self._slots, self.tables, bank, kv.block_size)
        else:
            self.steps = DeviceSteps(
                decoder,
                attention,
                self._slots,
                self.tables,
                bank,
                platform,
                block_size=kv.block_size,
                max_tokens=max_tokens,
                max_seqs=max_seqs,
                depth=depth,
                graphs=graphs,
            )
        self._stream = platform.stream()
        self._out = [platform.staging((9 * max_seqs,), torch.uint8) for _ in range(depth + 1)]
        self._launched = 0

    @property
    def graphs(self) -> StepGraphs | None:
        """Of captured steps; None where none is captured."""
        return self.steps.graphs if isinstance(self.steps, DeviceSteps) else None

    def launch(self, plan: StepPlan) -> Pending[StepResult]:
        """Starts a step after those launched before; whatever goes wrong, its result raises it.

        At most depth + 1 may be in flight. The order of the plan's single-token rows may change.
        """
        self._launched += 1
        try:
            columns, scoring, compute = self.steps.prepare(plan)
        except Exception as error:  # noqa: BLE001 - a value that no tensor takes is its sequence's fault, as in a step
            return self._stream.submit(partial(_raise, error))
        return self._stream.submit(partial(self._run, columns, scoring, compute))

    @torch.inference_mode()
    def _run(self, columns: StepColumns, scoring: list[PromptScoring], compute: Compute) -> StepResult:
        outputs = compute()
        count = len(columns.sample_slots)
        drawn = self._out[self._launched % len(self._out)][: len(outputs.drawn)]
        ids, finite = drawn_views(drawn)
        result = StepResult(ids[:count], finite[:count])
        if count:
            drawn.copy_(outputs.drawn, non_blocking=True)
            result.logprobs = self._chosen_logprobs(outputs, columns)
        for wanted in scoring:
            assert outputs.hidden is not None
            result.prompt_logprobs[wanted.row] = self._score_prompt(outputs.hidden, wanted)
        return result

    def _chosen_logprobs(self, outputs: StepOutputs, columns: StepColumns) -> dict[int, Scores]:
        """All rows that want them at once, with as many alternatives as the one that wants most."""
        wanted = self._slots.logprobs[columns.sample_slots]
        rows = (wanted >= 0).nonzero()[0].tolist()
        if not rows:
            return {}
        logits, ids = outputs.logits[: len(wanted)], outputs.ids[: len(wanted)]
        if len(rows) < len(wanted):
            chosen_rows = self._to_device(torch.tensor(rows))
            logits, ids = logits.index_select(0, chosen_rows), ids.index_select(0, chosen_rows)
        chosen, best, values = self._to_host(token_logprobs(logits, ids, int(wanted.max())))
        counts = wanted.tolist()
        return {
            row: (chosen[i : i + 1], best[i : i + 1, : counts[row]], values[i : i + 1, : counts[row]])
            for i, row in enumerate(rows)
        }

    def _to_device(self, host: Tensor) -> Tensor:
        """A copy that the host does not wait for."""
        staged = self._platform.staging(tuple(host.shape), host.dtype).copy_(host)
        return staged.to(self._platform.device, non_blocking=True)

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
