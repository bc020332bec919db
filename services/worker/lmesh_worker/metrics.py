"""The worker's metrics: vLLM's names where the meaning is the same, `lmesh:` where it is ours."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import REGISTRY, CollectorRegistry, Histogram
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from lmesh_worker.messages import Load, Ready, StepReport

_LABELS = ("model_name",)
_TOKEN_BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_SECOND_BUCKETS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)

NO_LOAD = Load(0, 0, 0, 0, 0, 0, 0, 0, 0)


class WorkerMetrics(Collector):
    """Gauges and counters are the engine's own, read when the page is; histograms are fed by its reports."""

    def __init__(
        self,
        model_name: str,
        *,
        slow_consumers: Callable[[], int],
        revoked: Callable[[], int],
        kv_granules: Callable[[], int],
        stuck: Callable[[], bool],
        registry: CollectorRegistry = REGISTRY,
    ) -> None:
        self._model_name = model_name
        self._slow_consumers = slow_consumers
        self._revoked = revoked
        self._kv_granules = kv_granules
        self._stuck = stuck
        self._registry = registry
        self._kv_blocks = 0
        self.load = NO_LOAD
        self._owned: list[Histogram] = []
        self._iteration_tokens = self._histogram("vllm:iteration_tokens_total", "Tokens of a step.", _TOKEN_BUCKETS)
        self._step_seconds = self._histogram("lmesh:engine_step_seconds", "Duration of a step.", _SECOND_BUCKETS)
        self._queue_seconds = self._histogram(
            "vllm:request_queue_time_seconds", "From a sequence's start to its first step.", _SECOND_BUCKETS
        )
        self._prefill_seconds = self._histogram(
            "vllm:request_prefill_time_seconds", "From a sequence's first step to its first output.", _SECOND_BUCKETS
        )
        registry.register(self)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        histogram = Histogram(name, text, _LABELS, buckets=buckets, registry=self._registry)
        self._owned.append(histogram)
        child: Histogram = histogram.labels(self._model_name)
        return child

    def ready(self, ready: Ready) -> None:
        """The engine's capacity is known."""
        self._kv_blocks = ready.kv_blocks

    def take(self, report: StepReport) -> None:
        """Counts one report. Gauges alone are no step, and a prompt's tokens count with its first output."""
        before, self.load = self.load, report.load
        if report.load.steps == before.steps or not report.keys:
            return
        tokens = report.load.prompt_tokens - before.prompt_tokens
        tokens += report.load.generated_tokens - before.generated_tokens
        self._iteration_tokens.observe(tokens)
        self._step_seconds.observe(report.step_us / 1e6)
        for timing in report.timings:
            self._queue_seconds.observe(timing.queue_us / 1e6)
            self._prefill_seconds.observe(timing.prefill_us / 1e6)

    def close(self) -> None:
        """Leaves the registry."""
        for collector in (self, *self._owned):
            self._registry.unregister(collector)

    def describe(self) -> Iterable[Metric]:
        """The families, without asking anybody."""
        return self.collect()

    def collect(self) -> Iterable[Metric]:
        """The families with the last load's values."""
        load = self.load
        yield self._gauge("vllm:num_requests_running", "Sequences in the running batch.", load.running)
        yield self._gauge("vllm:num_requests_waiting", "Sequences waiting in the engine.", load.waiting)
        usage = load.kv_blocks_used / self._kv_blocks if self._kv_blocks else 0.0
        yield self._gauge("vllm:kv_cache_usage_perc", "Share of KV blocks held by live sequences; 1 is all.", usage)
        yield self._gauge("lmesh:kv_blocks_used", "KV blocks held by live sequences.", load.kv_blocks_used)
        yield self._gauge("lmesh:kv_blocks", "KV blocks that there are.", self._kv_blocks)
        yield self._counter("vllm:prefix_cache_queries", "Prompt tokens looked up.", load.prefix_query_tokens)
        yield self._counter("vllm:prefix_cache_hits", "Prompt tokens found in the cache.", load.prefix_hit_tokens)
        yield self._counter("vllm:num_preemptions", "Sequences preempted.", load.preemptions)
        yield self._counter("vllm:prompt_tokens", "Prompt tokens computed.", load.prompt_tokens)
        yield self._counter("vllm:generation_tokens", "Tokens generated.", load.generated_tokens)
        yield self._counter("lmesh:engine_steps", "Steps committed.", load.steps)
        yield self._counter("lmesh:slow_consumers", "Gateways dropped as too slow.", self._slow_consumers())
        yield self._counter("lmesh:revoked_sequences", "Sequences dropped with a revoked lease.", self._revoked())
        yield self._gauge("lmesh:kv_granules", "Granules of the prefix cache that can be found.", self._kv_granules())
        yield self._gauge("lmesh:engine_stuck", "1 while the engine makes no progress.", int(self._stuck()))

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, text, labels=_LABELS)
        family.add_metric((self._model_name,), value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(name, text, labels=_LABELS)
        family.add_metric((self._model_name,), value)
        return family
