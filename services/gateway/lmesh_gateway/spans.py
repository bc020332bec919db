"""The span of one request at the gateway, with the gen_ai.* attributes."""

from __future__ import annotations

from lmesh_chassis import tracing
from opentelemetry.trace import Span, Status, StatusCode

from lmesh_gateway.generation import ChatPrompt, GenerationRequest
from lmesh_gateway.plan import Plan


class RequestSpan:
    """gateway.generate: the root, or a child of the client's traceparent."""

    def __init__(self, request: GenerationRequest) -> None:
        operation = "chat" if isinstance(request.prompt, ChatPrompt) else "text_completion"
        self._span: Span = tracing.start_span(
            tracing.GATEWAY_GENERATE,
            traceparent=request.traceparent,
            attributes={
                "gen_ai.operation.name": operation,
                "gen_ai.provider.name": "lmesh",
                "gen_ai.request.model": request.model,
            },
        )

    @property
    def traceparent(self) -> str:
        """What the scheduler and the worker hang their spans on."""
        return tracing.inject(self._span)

    def planned(self, plan: Plan) -> None:
        """The request is ready to be submitted."""
        params = plan.params
        self._span.set_attributes(
            {
                "gen_ai.request.id": plan.request_id,
                "gen_ai.response.id": plan.request_id,
                "gen_ai.request.temperature": params.temperature,
                "gen_ai.request.top_p": params.top_p,
                "gen_ai.request.top_k": params.top_k,
                "gen_ai.request.max_tokens": params.max_tokens,
                "gen_ai.request.choice.count": plan.n,
                # Both generations of names: readers of either find the counts.
                "gen_ai.usage.prompt_tokens": len(plan.prompt_ids),
                "gen_ai.usage.input_tokens": len(plan.prompt_ids),
            }
        )

    def event(self, name: str) -> None:
        """Something happened now."""
        self._span.add_event(name)

    def used(self, completion_tokens: int, cached_tokens: int) -> None:
        """What was generated, however the request ended."""
        self._span.set_attributes(
            {
                "gen_ai.usage.completion_tokens": completion_tokens,
                "gen_ai.usage.output_tokens": completion_tokens,
                "gen_ai.usage.cached_tokens": cached_tokens,
            }
        )

    def finished(self, reasons: list[str]) -> None:
        """All choices are complete."""
        self._span.set_attribute("gen_ai.response.finish_reasons", reasons)

    def failed(self, reason: str) -> None:
        """The request ended otherwise."""
        self._span.set_attribute("error.type", reason)
        self._span.set_status(Status(StatusCode.ERROR, reason))

    def end(self) -> None:
        """The client has all that it will get."""
        self._span.end()
