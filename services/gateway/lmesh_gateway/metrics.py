"""The gateway's metrics: vLLM's names where the meaning is the same, `lmesh:` where it is ours."""

from __future__ import annotations

import time

from prometheus_client import Counter, Gauge, Histogram

_MODEL = ("model_name",)
_LATENCIES = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
_INTER_TOKEN = (0.002, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0)
_E2E = (0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 60.0, 120.0, 240.0, 480.0)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)

TTFT = Histogram(
    "vllm:time_to_first_token_seconds", "From a request's arrival to its first token.", _MODEL, buckets=_LATENCIES
)
INTER_TOKEN = Histogram(
    "vllm:inter_token_latency_seconds", "Between a choice's tokens, as they reach here.", _MODEL, buckets=_INTER_TOKEN
)
E2E = Histogram("vllm:e2e_request_latency_seconds", "From a request's arrival to its last token.", _MODEL, buckets=_E2E)
SUCCESS = Counter("vllm:request_success", "Choices completed, by finish reason.", (*_MODEL, "finished_reason"))
PROMPT_TOKENS = Histogram("vllm:request_prompt_tokens", "Prompt tokens of a request.", _MODEL, buckets=_TOKENS)
GENERATION_TOKENS = Histogram(
    "vllm:request_generation_tokens", "New tokens of a request, over its choices.", _MODEL, buckets=_TOKENS
)
FAILED = Counter("lmesh:request_failures", "Requests that ended otherwise, by error reason.", (*_MODEL, "reason"))
LIVE = Gauge("lmesh:live_requests", "Requests between acceptance and end.", multiprocess_mode="livesum")
UNAUTHENTICATED = Counter("lmesh:unauthenticated", "Calls refused for want of a known API key.", ["face"])
REPLACED = Counter("lmesh:replaced_requests", "Requests that went on under a new placement, having lost theirs.")
DETACHED = Gauge("lmesh:detached_requests", "Requests that run on without a client.", multiprocess_mode="livesum")
RESUMED = Counter("lmesh:resumed_requests", "Resume calls taken, by where the request was found.", ("found",))
LEDGER_OK = Gauge("lmesh:ledger_ok", "1 when the ledger took the last write.", multiprocess_mode="livemin")
LEDGER_DROPPED = Counter("lmesh:ledger_dropped", "Requests that the ledger had no room to wait for.")
DROPPED_OUTPUTS = Counter("lmesh:dropped_outputs", "Worker outputs under a lease that is not held any more.")


class RequestMetrics:
    """Feeds the metrics of one request; times are from its construction."""

    def __init__(self) -> None:
        self._model = ""
        self._began = time.monotonic()
        self._last: dict[int, float] = {}
        self._inter_token: Histogram | None = None  # of the model: looked up once, not for each token

    def named(self, model: str) -> None:
        """The base model, known to exist: a label is neither what a client made up nor a tenant's adapter's name, for
        those have no bound and the page has no lock."""
        self._model = model

    def tokens(self, choice: int, count: int) -> None:
        """A choice got `count` new tokens just now."""
        if not count:
            return
        now = time.monotonic()
        if self._inter_token is None:
            TTFT.labels(self._model).observe(now - self._began)
            self._inter_token = INTER_TOKEN.labels(self._model)
        before, self._last[choice] = self._last.get(choice), now
        if before is not None:
            for _ in range(count):
                self._inter_token.observe((now - before) / count)

    def finished(self, reasons: list[str], prompt_tokens: int, completion_tokens: int) -> None:
        """All choices are complete, for these reasons."""
        E2E.labels(self._model).observe(time.monotonic() - self._began)
        PROMPT_TOKENS.labels(self._model).observe(prompt_tokens)
        GENERATION_TOKENS.labels(self._model).observe(completion_tokens)
        for reason in reasons:
            SUCCESS.labels(self._model, reason).inc()

    def failed(self, reason: str) -> None:
        """The request was refused, or ended before it was complete."""
        FAILED.labels(self._model, reason).inc()
