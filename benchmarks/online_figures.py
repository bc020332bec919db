"""From what the load clients saw to the figures of a case."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from load_client import Seen


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """What a request must keep to count as good."""

    ttft_s: float
    token_s: float  # mean seconds a token after the first


def figures(seen: Sequence[Seen], goal: Goal) -> dict[str, float]:
    """Of one run: rates over its wall time, latencies of the requests that ended well, times in milliseconds."""
    well = [s for s in seen if not s.error]
    if not well:
        return {"requests": len(seen), "failed": len(seen)}
    wall = max(s.end for s in seen) - min(s.begin for s in seen)
    first = [s.first - s.begin for s in well]
    each = [(s.end - s.first) / (s.tokens - 1) for s in well if s.tokens > 1]
    gaps = [gap for s in well for gap in s.gaps]
    good = sum(
        s.first - s.begin <= goal.ttft_s and (s.end - s.first) <= goal.token_s * max(1, s.tokens - 1) for s in well
    )
    found = {
        "requests": len(seen),
        "failed": len(seen) - len(well),
        "tok_s": sum(s.tokens for s in well) / wall,
        "wall_s": wall,
        "ttft_s": statistics.mean(first),
        "goodput_req_s": good / wall,
        "good_share": good / len(seen),
        **_spread("ttft_ms", first),
        **_spread("itl_ms", gaps),
        **_spread("token_ms", each),
    }
    if well[0].engine_s:
        found |= _spread("mesh_ttft_ms", [s.first - s.begin - s.engine_s for s in well])
    return found


def over_runs(runs: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Medians of each figure over the runs; requests and failures summed, and the range of the rate."""
    rates = [run["tok_s"] for run in runs if "tok_s" in run]
    names = dict.fromkeys(name for run in runs for name in run)
    line: dict[str, Any] = {
        name: round(statistics.median(run[name] for run in runs if name in run), 4) for name in names
    }
    line |= {name: int(sum(run[name] for run in runs)) for name in ("requests", "failed")}
    if rates:
        line |= {"tok_s_min": round(min(rates), 1), "tok_s_max": round(max(rates), 1)}
    return line


def _spread(name: str, seconds: Iterable[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    if not ordered:
        return {}
    return {f"{name}_p{p}": 1e3 * ordered[min(len(ordered) - 1, len(ordered) * p // 100)] for p in (50, 90, 99)}
