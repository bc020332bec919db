"""An adapter's publication is answered when the gateway that answers serves it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from lmesh.training.v1 import training_pb2 as pb
from lmesh_gateway import training_servicer
from lmesh_gateway.authentication import caller
from lmesh_gateway.training_servicer import TrainingServicer

ANSWER = pb.PublishAdapterResponse(adapter=pb.Adapter(model="m", name="two", version=3))


class Link:
    stub = SimpleNamespace(PublishAdapter=None)

    async def call(self, *told: object, **options: object) -> pb.PublishAdapterResponse:
        return ANSWER


def servicer(known: list[bool]) -> tuple[TrainingServicer, list[tuple[str, str]]]:
    asked: list[tuple[str, str]] = []

    def shows(model: str, tenant: str) -> bool:
        asked.append((model, tenant))
        return known[min(len(asked), len(known)) - 1]

    link: Any = Link()
    return TrainingServicer(link, None, shows), asked


async def published(of: TrainingServicer) -> pb.PublishAdapterResponse:
    caller.set("acme")
    return await of.PublishAdapter(pb.PublishAdapterRequest(name="two"), SimpleNamespace(time_remaining=lambda: None))


async def test_the_answer_waits_for_the_catalog() -> None:
    of, asked = servicer([False, False, True])
    assert await published(of) == ANSWER
    assert asked == [("m:two@3", "acme")] * 3


async def test_but_not_for_ever(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(training_servicer, "_SHOWN_S", 0.02)
    of, asked = servicer([False])
    assert await published(of) == ANSWER and len(asked) > 1
    assert "not yet known here" in caplog.text
