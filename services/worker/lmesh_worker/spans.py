"""The worker's spans: worker.generate for a sequence's stay, engine.step for the step that gave its first output."""

from __future__ import annotations

import time

from lmesh_chassis import tracing
from opentelemetry.trace import Span, Status, StatusCode
from opentelemetry.util.types import AttributeValue

from lmesh_worker.messages import Finish, Timing


class SequenceSpan:
    """One sequence's span; nothing when its Start carried no trace."""

    def __init__(self, traceparent: str, *, request_id: str, choice: int, prompt_tokens: int) -> None:
        self._span: Span | None = None
        self._new_tokens = 0
        if traceparent:
            attributes: dict[str, AttributeValue] = {
                "gen_ai.request.id": request_id,
                "gen_ai.usage.input_tokens": prompt_tokens,
                "lmesh.choice": choice,
            }
            self._span = tracing.start_span(tracing.WORKER_GENERATE, traceparent=traceparent, attributes=attributes)

    def first_output(self, timing: Timing, step_us: int) -> None:
        """Adds the queue, prefill and decode events, and the child span of the step that has just been committed."""
        if self._span is None:
            return
        now = time.time_ns()
        prefill_began = now - timing.prefill_us * 1000
        self._span.add_event("queue", {"duration_us": timing.queue_us}, prefill_began - timing.queue_us * 1000)
        self._span.add_event("prefill", {"duration_us": timing.prefill_us}, prefill_began)
        self._span.add_event("decode", {}, now)
        self._span.set_attribute("gen_ai.usage.cached_tokens", timing.cached_tokens)
        step = tracing.start_span(tracing.ENGINE_STEP, parent=self._span, start_ns=now - step_us * 1000)
        step.end(now)

    def count(self, new_tokens: int) -> None:
        """New tokens that came."""
        self._new_tokens += new_tokens

    def end(self, finish: int, reason: str = "") -> None:
        """The sequence ended."""
        if self._span is None:
            return
        self._span.set_attribute("gen_ai.usage.output_tokens", self._new_tokens)
        self._span.set_attribute("gen_ai.response.finish_reasons", [Finish(finish).name.lower()])
        if finish == Finish.ERROR:
            self._span.set_status(Status(StatusCode.ERROR, reason))
        self._span.end()
        self._span = None
