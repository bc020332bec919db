"""Names that dashboards and queries hang on: every metric and span, and the page that lists them."""

from __future__ import annotations

import re

from lmesh_chassis import tracing

from tests.contract.sources import ROOT, SERVICES, strings, table

PAGE = ROOT / "docs/metrics.md"
METRIC = re.compile(r"(vllm|lmesh):[a-z][a-z0-9_]*")
SPAN = re.compile(r"(gateway|scheduler|worker|engine|trainer)\.[a-z_]+")


def test_every_metric_is_documented_and_every_documented_one_exists() -> None:
    used = {s for folder in SERVICES.values() for p in folder.rglob("*.py") for s in strings(p) if METRIC.fullmatch(s)}
    assert used == {row[0] for row in table(PAGE, "Metrics")}


def test_spans() -> None:
    constants = {value for value in vars(tracing).values() if isinstance(value, str) and SPAN.fullmatch(value)}
    assert constants == {row[0] for row in table(PAGE, "Spans")}
    assert constants >= {"gateway.generate", "scheduler.queue", "worker.generate", "engine.step", "trainer.run"}
