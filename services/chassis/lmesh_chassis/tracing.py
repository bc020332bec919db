"""OpenTelemetry: one trace from the client to the engine step, exported over OTLP/HTTP when an endpoint is set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

TRACEPARENT_KEY = "traceparent"

GATEWAY_GENERATE = "gateway.generate"
SCHEDULER_QUEUE = "scheduler.queue"
WORKER_GENERATE = "worker.generate"
ENGINE_STEP = "engine.step"
TRAINER_RUN = "trainer.run"

_propagator = TraceContextTextMapPropagator()
_provider: TracerProvider | None = None


def setup(service: str, endpoint: str) -> None:
    """Starts exporting this process's spans to `endpoint` (base URL); does nothing when it is empty."""
    global _provider
    if not endpoint or _provider is not None:
        return
    # A fifth of a scheduler's start is the import of these, and a mesh waits for that start.
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    url = endpoint if endpoint.endswith("/v1/traces") else endpoint.rstrip("/") + "/v1/traces"
    _provider = TracerProvider(resource=Resource.create({"service.name": f"lmesh-{service}"}))
    _provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=url)))
    trace.set_tracer_provider(_provider)


def shutdown() -> None:
    """Sends what is left and stops the exporter."""
    if _provider is not None:
        _provider.shutdown()


def tracer() -> trace.Tracer:
    """The tracer of all lmesh spans; spans cost next to nothing while there is no exporter."""
    return trace.get_tracer("lmesh")


def start_span(
    name: str,
    *,
    traceparent: str = "",
    parent: Span | None = None,
    start_ns: int | None = None,
    attributes: Mapping[str, AttributeValue] | None = None,
) -> Span:
    """A span under `parent`, else under `traceparent`, else under the current one. The caller ends it."""
    if parent is not None:
        context: Context | None = trace.set_span_in_context(parent)
    else:
        context = extract(traceparent) if traceparent else None
    return tracer().start_span(name, context=context, start_time=start_ns, attributes=attributes)


def inject(span: Span | None = None) -> str:
    """The W3C traceparent of `span`, else of the current one; empty when there is no trace."""
    carrier: dict[str, str] = {}
    _propagator.inject(carrier, None if span is None else trace.set_span_in_context(span))
    return carrier.get(TRACEPARENT_KEY, "")


def extract(traceparent: str) -> Context:
    """The context that a traceparent names; an empty or malformed one gives a context without a trace."""
    return _propagator.extract({TRACEPARENT_KEY: traceparent}, Context())


def attach(traceparent: str) -> None:
    """Makes a traceparent the current context of this task, for the task's whole life."""
    if traceparent:
        otel_context.attach(extract(traceparent))


def current_trace_id() -> str:
    """Hex id of the current trace; empty when there is none."""
    span = trace.get_current_span().get_span_context()
    return f"{span.trace_id:032x}" if span.is_valid else ""


def outgoing_metadata() -> tuple[tuple[str, str], ...]:
    """Metadata that carries the current trace into a call."""
    traceparent = inject()
    return ((TRACEPARENT_KEY, traceparent),) if traceparent else ()
