"""The training loop: steps until the end or until asked to stop, with evaluations and checkpoints on the way."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from lmesh_kernels.layers.packed_batch import PackedBatch, Segment, pack_batch
from lmesh_kernels.models.parameters import Parameters

from lmesh_trainer import events
from lmesh_trainer.checkpoint import Checkpoint, Progress, list_checkpoints, load_checkpoint, prune, save_checkpoint
from lmesh_trainer.data.dataset import microbatches
from lmesh_trainer.data.feed import Feed
from lmesh_trainer.data.rows import Row
from lmesh_trainer.errors import JobError
from lmesh_trainer.learner import Learner, Update
from lmesh_trainer.messages import Wish
from lmesh_trainer.optimiser import Optimiser
from lmesh_trainer.ranks import from_first
from lmesh_trainer.schedule import Course, rate_factor
from lmesh_trainer.spec import JobSpec

_log = logging.getLogger(__name__)

MOST_SKIPPED = 3  # updates in a row that were not finite: the job has gone wrong


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Parts:
    """What a loop works with."""

    spec: JobSpec
    spec_digest: str
    feed: Feed
    learner: Learner
    parameters: Parameters
    optimiser: Optimiser
    micro_tokens: int
    folder: Path  # of the job; checkpoints lie in a folder of it
    device: torch.device
    report: Callable[[events.Event], None]
    asked: Callable[[], Wish | None]
    peak_bytes: Callable[[], int]
    rank: int = 0
    world: int = 1


class Loop:
    """One job's steps. `run` may be called once."""

    def __init__(self, parts: Parts) -> None:
        self._parts, self._spec = parts, parts.spec
        self.total_steps = parts.feed.total_steps
        self._progress = Progress(step=0, spec_digest=parts.spec_digest)
        self._checkpoints = parts.folder / "checkpoints"
        self._saved_at = -1

    @property
    def progress(self) -> Progress:
        """Where the job is."""
        return self._progress

    def resume(self) -> bool:
        """Goes on from the newest checkpoint that is whole, if there is one; a corrupt one is passed over, and said.

        Raises JobError CHECKPOINT_MISMATCH for one of another job, CORRUPT_CHECKPOINT when all there are are corrupt.
        """
        found = from_first(self._newest)
        if found is None:
            return False
        self._restore(found.parameters)
        self._parts.optimiser.load(found.optimiser)
        self._parts.feed.go_to(found.progress.step, found.cursor)
        self._progress, self._saved_at = found.progress, found.progress.step
        return True

    def _newest(self) -> Checkpoint | None:
        failed: JobError | None = None
        for path in reversed(list_checkpoints(self._checkpoints)):
            try:
                found = load_checkpoint(path)
            except JobError as error:
                _log.warning("a checkpoint is passed over: %s", error.message, extra={"reason": error.reason})
                failed = failed or error
                continue
            if found.progress.spec_digest != self._parts.spec_digest:
                raise JobError("CHECKPOINT_MISMATCH", f"{path.name} is of a job with other settings or another model")
            return found
        if failed is not None:
            raise failed
        return None

    @torch.no_grad()
    def _restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        if tensors.keys() != {p.name for p in self._parts.parameters}:
            raise JobError("CHECKPOINT_MISMATCH", "the checkpoint's tensors are not those that this job trains")
        for parameter in self._parts.parameters:
            parameter.master.copy_(self._parts.parameters.part(parameter.name, tensors[parameter.name]))
        self._parts.parameters.publish()

    def rehearse(self) -> None:
        """Runs the heaviest microbatch of the longest rows once, without effect: memory fails now or not at all."""
        packs = microbatches(self._parts.feed.worst_rows(self._parts.micro_tokens), self._parts.micro_tokens)
        heaviest = max(packs, key=lambda pack: sum(len(segment.ids) for segment in pack))
        try:
            self._parts.learner.rehearse([self._batch(heaviest)])
        except (torch.OutOfMemoryError, MemoryError) as error:
            tokens = sum(len(segment.ids) for segment in heaviest)
            raise JobError("OUT_OF_MEMORY", f"a microbatch of {tokens} tokens does not fit: {error}") from error

    def run(self) -> events.Outcome:
        """Steps to the end. Raises JobError NON_FINITE_LOSS, DISK_FULL or CHECKPOINT_FAILED."""
        in_a_row = 0
        while self._progress.step < self.total_steps:
            match self._parts.asked():
                case Wish.CANCEL:
                    return events.Outcome.CANCELLED
                case Wish.STOP:
                    self._save()
                    return events.Outcome.STOPPED
            in_a_row = 0 if self._step() else in_a_row + 1
            if in_a_row == MOST_SKIPPED:
                hint = f"loss or gradients of {in_a_row} updates in a row were not finite; lower the learning rate"
                raise JobError("NON_FINITE_LOSS", hint)
            enough = self._evaluate() if self._due(self._spec.eval_steps) and self._parts.feed.eval_rows else False
            if enough or (self._due(self._spec.save_steps) and not in_a_row):
                self._save()
            if enough:
                break
        if self._saved_at != self._progress.step:
            self._save()
        return events.Outcome.COMPLETED

    def _due(self, every: int) -> bool:
        step = self._progress.step
        due = step % every == 0 if every else self._parts.feed.ends_epoch(step)
        return due or step == self.total_steps

    def _step(self) -> bool:
        begin, step = time.perf_counter(), self._progress.step
        rows = self._parts.feed.step_rows(step)
        rate = self._rate(step)
        update = self._parts.learner.update(self._batches(rows), step=step, rate=rate)
        seconds = time.perf_counter() - begin
        self._progress = msgspec.structs.replace(
            self._progress,
            step=step + 1,
            tokens=self._progress.tokens + update.tokens,
            trained_tokens=self._progress.trained_tokens + update.trained_tokens,
            last_loss=update.loss if update.applied else self._progress.last_loss,
            skipped=self._progress.skipped + (not update.applied),
        )
        if not update.applied:
            self._keep_rows(step, rows)
        self._tell(update, rate, seconds)
        return update.applied

    def _rate(self, step: int) -> float:
        told = self._spec.optimiser
        warmup = told.warmup_steps or round(told.warmup_ratio * self.total_steps)
        course = Course(told.lr_scheduler_type)
        factor = rate_factor(course, step, warmup_steps=warmup, total_steps=self.total_steps)
        return told.learning_rate * factor

    def _batches(self, rows: list[Row]) -> list[PackedBatch]:
        parts = self._parts
        packs = microbatches(rows, parts.micro_tokens, rank=parts.rank, world=parts.world)
        return [self._batch(pack) for pack in packs]

    def _batch(self, pack: list[Segment]) -> PackedBatch:
        return pack_batch(pack, self._parts.device)

    def _tell(self, update: Update, rate: float, seconds: float) -> None:
        self._parts.report(
            events.StepDone(
                global_step=self._progress.step,
                epoch=round(self._parts.feed.epochs(self._progress.step), 4),
                loss=update.loss,
                grad_norm=update.grad_norm,
                learning_rate=rate,
                mean_token_accuracy=update.accuracy,
                num_tokens=self._progress.tokens,
                tokens_per_second=update.trained_tokens / seconds,
                step_time=seconds,
                peak_bytes=self._parts.peak_bytes(),
                applied=update.applied,
            )
        )

    def _keep_rows(self, step: int, rows: list[Row]) -> None:
        """Which rows made an update that was not finite, for whoever looks into it."""
        folder = self._parts.folder / "not-finite"
        folder.mkdir(exist_ok=True)
        told = [{"row": row.number, "line": row.line, "ids": list(row.ids)} for row in rows]
        (folder / f"step-{step:08d}.json").write_text(json.dumps(told))

    def _evaluate(self) -> bool:
        """Evaluates the held-out rows; whether that is enough of training."""
        loss, accuracy = self._parts.learner.evaluate(self._batches(list(self._parts.feed.eval_rows)))
        step, before = self._progress.step, self._progress.best_eval_loss
        better = before is None or loss < before
        worse = 0 if better else self._progress.worse_evaluations + 1
        self._progress = msgspec.structs.replace(
            self._progress,
            best_eval_loss=loss if better else before,
            best_step=step if better else self._progress.best_step,
            worse_evaluations=worse,
        )
        told = events.Evaluated(global_step=step, eval_loss=loss, eval_mean_token_accuracy=accuracy)
        self._parts.report(told)
        if better and self._spec.early_stop_patience:
            self._save()
        return bool(self._spec.early_stop_patience) and worse >= self._spec.early_stop_patience

    def _save(self) -> None:
        if self._saved_at == self._progress.step:
            return
        begin = time.perf_counter()
        # All ranks gather what each holds a part of, and the first writes it.
        masters, state = self._parts.parameters.wholes(), self._parts.optimiser.state()
        self._saved_at = self._progress.step
        if self._parts.rank != 0:
            return
        path = save_checkpoint(self._checkpoints, self._progress, masters, state, self._parts.feed.cursor())
        seconds = time.perf_counter() - begin
        best = self._checkpoints / f"step-{self._progress.best_step:08d}"
        prune(self._checkpoints, self._spec.keep_checkpoints, spare=best if self._spec.early_stop_patience else None)
        self._parts.report(events.CheckpointSaved(global_step=self._progress.step, folder=str(path), seconds=seconds))

    def take_best(self) -> None:
        """Goes back to the parameters with the best evaluation, where the job stops early and there was one before.

        Raises JobError CORRUPT_CHECKPOINT where they are gone.
        """
        step = self._progress.best_step
        if not self._spec.early_stop_patience or step in (0, self._progress.step):
            return
        found = from_first(lambda: load_checkpoint(self._checkpoints / f"step-{step:08d}"))
        assert found is not None
        self._restore(found.parameters)
