"""Where the time of a steady decode step goes: kernels by device time, gaps between them, the host and its waits.

Kernels that begin while the one ahead ends (PDL) count the time that they wait for it: they add up to more than a step.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from lmesh_worker.engine.engine import Engine
from lmesh_worker.messages import Params, Start
from torch.profiler import ProfilerActivity, profile, record_function

# Host calls that wait for the device. One cudaEventSynchronize a step is the loop's own: it waits for the oldest step
# while the next one runs. Everything else holds the host up.
_WAITS = ("StreamSynchronize", "DeviceSynchronize", "EventSynchronize")
_BLOCKING = ("cudaMemcpy", "hipMemcpy", "aten::item", "aten::nonzero")
_REGION = "lmesh.steady_steps"
_TOP = 14


@dataclass(frozen=True, slots=True)
class Kernel:
    """All launches of one name (of one operation, on a CPU), a step."""

    name: str
    calls: float
    us: float


@dataclass(frozen=True, slots=True)
class StepProfile:
    """A decode step of `rows` sequences; microseconds a step."""

    rows: int
    step_us: float  # without the profiler
    profiled_step_us: float
    busy_us: float  # at least one kernel runs; the host's work on a CPU
    waits_us: float  # the host waits for a step's results, without the profiler
    waits: dict[str, float]  # calls a step, by name
    kernels: list[Kernel]

    def line(self) -> dict[str, Any]:
        """For a JSON line; `gap_us` is the device idle, `host_us` the host at work."""
        return {
            "profile": f"decode x {self.rows}",
            "step_us": round(self.step_us, 1),
            "profiled_step_us": round(self.profiled_step_us, 1),
            "busy_us": round(self.busy_us, 1),
            "gap_us": round(max(0.0, self.step_us - self.busy_us), 1),
            "host_us": round(self.step_us - self.waits_us, 1),
            "waits_a_step": {name: round(count, 2) for name, count in self.waits.items()},
        }

    def table(self) -> str:
        """The kernels that take longest, in text."""
        total = sum(kernel.us for kernel in self.kernels) or 1.0
        top, rest = self.kernels[:_TOP], self.kernels[_TOP:]
        if rest:
            top = [*top, Kernel(f"{len(rest)} others", sum(k.calls for k in rest), sum(k.us for k in rest))]
        lines = [f"{k.us:>10.1f}{k.us / total:>8.1%}{k.calls:>8.1f}  {k.name[:90]}" for k in top]
        return "\n".join([f"{'us/step':>10}{'share':>8}{'calls':>8}  kernel", *lines])


def profile_decode(engine: Engine, rows: int, *, context: int = 512, steps: int = 24) -> StepProfile:
    """Profiles `steps` steps in which `rows` sequences of about `context` tokens decode and nothing else happens."""
    keys = _begin(engine, rows, context, 4 * steps)
    try:
        with _clocked_waits() as waited:
            plain_us = _timed(engine, steps)
        waits_us = sum(waited) / steps * 1e6
        gpu = engine.platform.device.type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
        with profile(activities=activities, acc_events=True) as recorded:
            _settle(gpu)  # so that what the device does from here on is of these steps alone
            begin = time.perf_counter()
            with record_function(_REGION):
                _timed(engine, steps)
            _settle(gpu)  # the host is a step ahead
            profiled_us = (time.perf_counter() - begin) / steps * 1e6
    finally:
        for key in keys:
            engine.abort(key)
        while engine.has_work:
            engine.step()
    found = _summarise(_steady(recorded.events() or []), steps, gpu)
    return replace(found, rows=rows, step_us=plain_us, profiled_step_us=profiled_us, waits_us=waits_us)


def _begin(engine: Engine, rows: int, context: int, most: int) -> list[int]:
    """Has `rows` sequences decoding steadily; their keys."""
    keys = [-2 - i for i in range(rows)]  # no other user of the engine counts down
    vocab = engine.limits.vocab_size
    for key in keys:
        ids = [(7 * i - 13 * key) % vocab for i in range(context)]
        engine.add(Start(key, f"profile{key}", 0, ids, context, Params(max_tokens=2 * most)))
    awaited = set(keys)
    while awaited:
        report = engine.step()
        if report is not None:
            if report.errors:
                raise RuntimeError(f"{report.errors[0].reason}: {report.errors[0].message}")
            awaited -= set(report.keys)
    for _ in range(8):
        engine.step()
    return keys


def _timed(engine: Engine, steps: int) -> float:
    """Microseconds a step."""
    begin = time.perf_counter()
    for _ in range(steps):
        engine.step()
    return (time.perf_counter() - begin) / steps * 1e6


def _settle(gpu: bool) -> None:
    """Waits until the device has done what it was given."""
    if gpu:
        torch.cuda.synchronize()


def _steady(events: Iterable[Any]) -> list[Any]:
    """Events of the profiled steps: the host's within the region, the device's from its begin on."""
    events = list(events)
    region = next(e for e in events if e.name == _REGION and not _on_device(e))
    begin, end = region.time_range.start, region.time_range.end
    return [
        e
        for e in events
        if e.name != _REGION and begin <= e.time_range.start and (_on_device(e) or e.time_range.start <= end)
    ]


def _on_device(event: Any) -> bool:  # noqa: ANN401 - the profiler's own class has no stubs
    return bool(event.device_type != torch.autograd.DeviceType.CPU)


def _summarise(events: list[Any], steps: int, gpu: bool) -> StepProfile:
    """What the events tell; the times of whole steps are still missing."""
    totals: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    waits: dict[str, float] = defaultdict(float)
    spans: list[tuple[float, float]] = []
    for event in events:
        on_device = _on_device(event)
        took = event.time_range.end - event.time_range.start
        if on_device:
            spans.append((event.time_range.start, event.time_range.end))
        elif event.name.endswith(_WAITS) or event.name in _BLOCKING:
            waits[event.name] += 1 / steps
        if on_device == gpu:
            entry = totals[event.name]
            entry[0] += 1 / steps
            entry[1] += (took if gpu else event.self_cpu_time_total) / steps
    kernels = sorted((Kernel(name, *entry) for name, entry in totals.items()), key=lambda k: -k.us)
    busy = _covered(spans) / steps if gpu else sum(kernel.us for kernel in kernels)
    return StepProfile(0, 0.0, 0.0, busy, 0.0, dict(waits), kernels)


@contextmanager
def _clocked_waits() -> Iterator[list[float]]:
    """Seconds that the host spends in `Pending.result` of a CUDA stream, wait by wait."""
    from lmesh_kernels.platforms.cuda import EventPending

    waited: list[float] = []
    plain = EventPending.result

    def clocked(pending: EventPending[Any]) -> Any:  # noqa: ANN401 - whatever a step gives
        begin = time.perf_counter()
        try:
            return plain(pending)
        finally:
            waited.append(time.perf_counter() - begin)

    EventPending.result = clocked  # type: ignore[method-assign]
    try:
        yield waited
    finally:
        EventPending.result = plain  # type: ignore[method-assign]


def _covered(spans: list[tuple[float, float]]) -> float:
    """Microseconds in which at least one span lies."""
    covered, until = 0.0, float("-inf")
    for begin, end in sorted(spans):
        covered += max(0.0, end - max(begin, until))
        until = max(until, end)
    return covered
