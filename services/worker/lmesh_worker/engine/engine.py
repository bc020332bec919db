"""The engine: schedule -> run -> commit over one model on one device, one step ahead of it."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterable

import torch
from lmesh_kernels import platforms
from lmesh_kernels.blocks import root_hash
from lmesh_kernels.layers.kv_cache import KVCache
from lmesh_kernels.lora.bank import AdapterBank
from lmesh_kernels.models.config import load_config
from lmesh_kernels.models.registry import load_model
from lmesh_kernels.platforms.platform import Pending
from lmesh_kernels.text.digests import base_digest, dummy_digest
from lmesh_kernels.text.resolve import ModelFiles

from lmesh_worker.engine.adapters import ADAPTER_NOT_LOADED, Adapters
from lmesh_worker.engine.batcher import Batcher
from lmesh_worker.engine.block_pool import BlockPool
from lmesh_worker.engine.commit import Committer
from lmesh_worker.engine.config import EngineConfig
from lmesh_worker.engine.first_times import first_times, plan_of
from lmesh_worker.engine.memory import MemoryPlan, plan_memory
from lmesh_worker.engine.outputs import ReportBuilder
from lmesh_worker.engine.plan import StepPlan
from lmesh_worker.engine.quarantine import STEP_FAILED, isolate
from lmesh_worker.engine.runner import Runner, StepResult
from lmesh_worker.engine.sequence import Sequence
from lmesh_worker.messages import Finish, Load, Start, StepReport
from lmesh_worker.start_check import Limits, find_fault

log = logging.getLogger(__name__)

_QUIET_S = 0.1  # steps without outputs are reported this often at most


class Engine:
    """Runs sequences. One thread calls it; nothing here waits for a network.

    Raises ConfigError, UnsupportedModelError or WeightsError when it cannot be built.
    """

    def __init__(self, config: EngineConfig, files: ModelFiles) -> None:
        self.config = config
        self.platform = platforms.detect(config.device, threads=config.threads)
        model = load_config(files)
        self.depth = config.pipeline_depth if config.pipeline_depth >= 0 else int(self.platform.overlaps)
        self.plan: MemoryPlan = plan_memory(config, model, self.platform)
        plan = self.plan
        decoder = load_model(
            files,
            dtype=plan.dtype,
            device=self.platform.device,
            quantisation=plan.quantisation,
            load_format="dummy" if config.load_format == "dummy" else "auto",
            platform=self.platform,
        )
        if config.batch_invariant:
            decoder.fix_bits()
        if plan.pack_weights:
            decoder.pack()
        # One more than the pool hands out: what rows that fill up a batch write goes there.
        self.kv = KVCache(model, plan.kv_blocks + 1, plan.block_size, plan.dtype, self.platform.device)
        self.decoder = decoder
        self.kv_format = f"{str(plan.dtype).removeprefix('torch.')}/{plan.block_size}/{KVCache.LAYOUT}"
        self.pool = BlockPool(plan.kv_blocks)
        self.batcher = Batcher(
            self.pool,
            block_size=plan.block_size,
            max_seqs=plan.max_seqs,
            max_step_tokens=plan.max_step_tokens,
            max_model_len=plan.max_model_len,
            prefix_cache=config.prefix_cache,
        )
        self.adapters = Adapters(AdapterBank(decoder, max_bytes=plan.adapter_bytes), model, depth=self.depth)
        self._runner = Runner(
            decoder,
            self.kv,
            self.platform,
            max_tokens=plan.max_step_tokens,
            max_seqs=plan.max_seqs,
            max_blocks=plan.max_blocks,
            depth=self.depth,
            bank=self.adapters.bank,
            graphs=not config.enforce_eager,
            invariant=config.batch_invariant,
        )
        self.limits = Limits(max_model_len=plan.max_model_len, vocab_size=model.vocab_size)
        digest_of = dummy_digest if config.load_format == "dummy" else base_digest
        self._digest = config.model_digest or digest_of(files, nf4=plan.quantisation == "nf4")
        self._roots: dict[tuple[str, str], bytes] = {}
        self._live: dict[int, Sequence] = {}
        self._commit = Committer(self.batcher, self._forget)
        self._in_flight: deque[tuple[StepPlan, Pending[StepResult]]] = deque()
        self._report = ReportBuilder()
        self._gauges_changed = False
        self._arrivals = 0
        self._steps = 0
        self.cold = first_times(
            self.platform.device.type != "cpu",
            None if (graphs := self._runner.graphs) is None else graphs.sizes,
            max_tokens=plan.max_step_tokens,
            max_seqs=plan.max_seqs,
            max_len=plan.max_model_len,
        )
        self._first_tenure = -2
        self._reported_at, self._reported_steps = 0.0, 0

    # -- commands

    def add(self, start: Start) -> None:
        """Queues a sequence; one that cannot run ends by an error in the next report, and harms nothing else."""
        fault = find_fault(start.ids, start.prompt_len, start.params, self.limits)
        if fault is None and start.key in self._live:
            raise ValueError(f"key {start.key} is in use")
        if fault is not None:
            self._report.error(start.key, fault.reason, fault.message, len(start.ids))
            return
        if start.adapter and not self.adapters.available(start.adapter):
            message = f"adapter {start.adapter} is not loaded here"
            self._report.error(start.key, ADAPTER_NOT_LOADED, message, len(start.ids))
            return
        self._arrivals += 1
        sequence = Sequence(start, self._root(start.cache_salt, start.adapter), self._arrivals)
        if len(start.ids) > start.prompt_len and (finish := sequence.end(self.plan.max_model_len)) is not None:
            # Taken over from a worker that died after the last id: all that is missing is the word that it ended.
            self._report.finish(start.key, finish, len(start.ids))
            return
        self._live[start.key] = sequence
        if sequence.adapter:
            self.adapters.retain(sequence.adapter)
        self.batcher.add(sequence)

    def abort(self, key: int) -> None:
        """Drops a sequence; its blocks are free at once. Unknown keys are ignored: it may just have ended."""
        sequence = self._live.get(key)
        if sequence is None:
            return
        self.batcher.remove(sequence)
        self._forget(sequence)
        self._report.finish(key, Finish.ABORTED, len(sequence.ids))
        self._gauges_changed = True

    def _root(self, salt: str, adapter: str) -> bytes:
        known = self._roots.get((salt, adapter))
        if known is None:
            if len(self._roots) > 4096:  # tenants come and go; a root is cheap to make again
                self._roots.clear()
            known = self._roots[salt, adapter] = root_hash(
                model_digest=self._digest,
                weights_version=self.config.weights_version,
                adapter_digest=adapter,
                cache_salt=salt,
                kv_format=self.kv_format,
            )
        return known

    def _forget(self, sequence: Sequence) -> None:
        if self._live.pop(sequence.key, None) is not None and sequence.adapter:
            self.adapters.release(sequence.adapter)

    # -- the loop

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to do or to report."""
        return bool(self._live or self._in_flight or self._report or self._gauges_changed)

    def step(self) -> StepReport | None:
        """Schedules and launches one step, then commits the oldest one if the pipeline is full or nothing was new.

        Returns what there is to report, or None while the pipeline fills.
        """
        begin = time.perf_counter()
        plan = self.batcher.schedule()
        if plan is not None:
            self._in_flight.append((plan, self._runner.launch(plan)))
        if self._in_flight and (plan is None or len(self._in_flight) > self.depth):
            self._commit_oldest()
            self.adapters.settle(len(self._in_flight))
        elif not self._in_flight:
            self.adapters.settle(0)
        return self._take_report(begin)

    def _commit_oldest(self) -> None:
        plan, pending = self._in_flight.popleft()
        try:
            result = pending.result()
        except Exception as error:  # noqa: BLE001 - whatever a step raises concerns its sequences, not the engine
            self._recover(plan, error)
            return
        self._steps += 1
        self._commit.apply(plan, result, self._report)

    def _recover(self, plan: StepPlan, error: Exception) -> None:
        later = [p for p, _ in self._in_flight]
        for _, pending in self._in_flight:
            _wait_out(pending)
        self._in_flight.clear()
        for culprit in isolate(self.batcher, [plan, *later], error):
            self.batcher.remove(culprit.sequence)
            self._forget(culprit.sequence)
            message = f"a step with this sequence failed: {type(culprit.error).__name__}"
            self._report.error(culprit.sequence.key, STEP_FAILED, message, len(culprit.sequence.ids))

    def _take_report(self, begin: float) -> StepReport | None:
        # A long prompt's steps give no ids; they are told of now and then, or they would look like no progress.
        quiet = begin - self._reported_at < _QUIET_S
        if not self._report and not self._gauges_changed and (quiet or self._steps == self._reported_steps):
            return None
        report, self._report, self._gauges_changed = self._report, ReportBuilder(), False
        self._reported_at, self._reported_steps = begin, self._steps
        micros = round((time.perf_counter() - begin) * 1e6)
        version = self.config.weights_version
        return report.build(self.load(), self.pool.changes, weights_version=version, step_us=micros)

    def load(self) -> Load:
        """Gauges and counters now."""
        return Load(
            running=len(self.batcher.running),
            waiting=len(self.batcher.waiting),
            kv_blocks_used=self.pool.num_held,
            steps=self._steps,
            prefix_query_tokens=self.batcher.prefix_query_tokens,
            prefix_hit_tokens=self.batcher.prefix_hit_tokens,
            preemptions=self.batcher.preemptions,
            prompt_tokens=self._commit.prompt_tokens,
            generated_tokens=self._commit.generated_tokens,
        )

    # -- conveniences

    def generate(self, starts: Iterable[Start]) -> dict[int, list[int]]:
        """Runs sequences to their end; new ids by key. RuntimeError for one that fails."""
        out: dict[int, list[int]] = {}
        for start in starts:
            out[start.key] = []
            self.add(start)
        while self.has_work:
            report = self.step()
            if report is None:
                continue
            if report.errors:
                raise RuntimeError(f"{report.errors[0].reason}: {report.errors[0].message}")
            at = 0
            for key, count in zip(report.keys, report.n_new, strict=True):
                out[key] += report.ids[at : at + count]
                at += count
        return out

    def warm_up(self) -> None:
        """Runs a few tokens, so that the first request does not pay for first-time work of the libraries.

        On an accelerator only a greedy prompt: compiling decodes and what draws at random takes longer than all else,
        and `warm_next` does it when nothing waits for it.
        """
        self.warm_next()
        if self.platform.device.type == "cpu":
            while self.cold:
                self.warm_next()

    def warm_next(self) -> None:
        """Does the next piece of first-time work."""
        piece = self.cold.popleft()
        plan = plan_of(
            piece,
            tenure=self._first_tenure,
            spare_block=self.kv.num_blocks - 1,
            block_size=self.plan.block_size,
            max_len=self.plan.max_model_len,
        )
        self._first_tenure -= len(plan.rows)
        for _ in range(piece.times):
            self._runner.launch(plan).result()

    @property
    def captures(self) -> int:
        """Steps captured so far."""
        graphs = self._runner.graphs
        return 0 if graphs is None else graphs.captures

    def close(self) -> None:
        """Waits for launched work and gives the device back."""
        self._runner.close()
        self.adapters.close()
        if self.platform.device.type == "cuda":
            torch.cuda.empty_cache()


def _wait_out(pending: Pending[StepResult]) -> None:
    """Lets a void step end: its buffers and blocks are about to be used again."""
    try:
        pending.result()
    except Exception:
        log.debug("a void step failed too", exc_info=True)
