"""The sampler on a device: `python kernels/benchmarks/sample.py`; one JSON line a case, times in microseconds.

Times are medians of graph replays. `reference_us` is plain torch with a full sort, `argmax_us` torch's argmax and its
sum for the finite flag; `floor_us` reading the logits once at the rate of a copy in the same run.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable

import torch
from lmesh_kernels.ops.adjust import Adjustment
from lmesh_kernels.ops.sample import sample_reference, sample_rows
from lmesh_kernels.ops.sample_params import SampleHints, SampleParams
from torch import Tensor

# name: temperature, top_p, top_k, floor, with penalties
MODES: dict[str, tuple[float, float, int, float, bool]] = {
    "greedy": (0.0, 1.0, 0, -math.inf, False),
    "greedy+penalties": (0.0, 1.0, 0, -math.inf, True),
    "random": (1.0, 1.0, 0, -math.inf, False),
    "top_k50_p95": (1.0, 0.95, 50, -math.inf, False),
    "top_p95": (1.0, 0.95, 0, -math.inf, False),
    "min_p": (1.0, 1.0, 0, math.log(0.05), False),
}


def replay_us(work: Callable[[], object], repeats: int = 30) -> float:
    """Median time of one replay of a graph of `work`."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    graph.replay()
    return statistics.median(event_ms(graph.replay) * 1e3 for _ in range(repeats))


def event_ms(work: Callable[[], object]) -> float:
    """Time of what `work` launches, between two events."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    work()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


def copy_tb_s(device: torch.device) -> float:
    """Bytes read and written a second by a device-to-device copy."""
    source = torch.randn(2**30, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 8 * 2 * source.nbytes / event_ms(lambda: [target.copy_(source) for _ in range(8)]) / 1e9


def parameters(rows: int, mode: str, device: torch.device) -> SampleParams:
    """Columns of a mode, all rows alike but for their noise."""
    temperature, top_p, top_k, floor, _ = MODES[mode]
    index = torch.arange(rows, device=device)
    return SampleParams(
        temperature=torch.full((rows,), temperature, device=device),
        top_p=torch.full((rows,), top_p, device=device),
        top_k=torch.full((rows,), top_k, dtype=torch.int32, device=device),
        floor=torch.full((rows,), floor, device=device),
        seed=index * 7919,
        choice=index * 0,
        position=index + 100,
    )


def penalties(rows: int, vocab: int, device: torch.device) -> Adjustment:
    """Penalties on every row, a hundredth of the vocabulary seen."""
    some = torch.full((rows,), 1.1, device=device)
    none = torch.full((rows,), -1, dtype=torch.int64, device=device)
    seen = (torch.rand(rows, vocab, device=device) < 0.01).to(torch.int16)
    slots = torch.arange(rows, device=device)
    return Adjustment(repetition=some, presence=some, frequency=some, seen_row=slots, bias_row=none, seen=seen)


def measure(logits: Tensor, mode: str, reference: bool) -> dict[str, float]:
    """The times of one case."""
    rows, vocab = logits.shape
    params = parameters(rows, mode, logits.device)
    adjustment = penalties(rows, vocab, logits.device) if MODES[mode][4] else None
    temperature, top_p, top_k, floor, _ = MODES[mode]
    hints = SampleHints(any_random=temperature > 0, any_truncation=top_p < 1 or top_k > 0 or floor > -math.inf)
    ids = torch.empty(rows, dtype=torch.int64, device=logits.device)
    finite = torch.empty(rows, dtype=torch.bool, device=logits.device)
    times = {"us": replay_us(lambda: sample_rows(logits, params, hints, ids, finite, adjustment))}
    if mode == "greedy":
        times["argmax_us"] = replay_us(lambda: (logits.argmax(-1), logits.sum(-1, dtype=torch.float32).isfinite()))
    elif reference:
        times["reference_us"] = replay_us(lambda: sample_reference(logits, params, adjustment), 5)
    return times


def main() -> None:
    """Prints all cases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--vocab", type=int, nargs="+", default=[128256, 151936])
    parser.add_argument("--spread", type=float, default=2.5, help="standard deviation of the logits")
    parser.add_argument("--no-reference", action="store_true")
    args = parser.parse_args()
    device = torch.device("cuda")
    rate = copy_tb_s(device)
    for vocab in args.vocab:
        for rows in args.rows:
            logits = (torch.randn(rows, vocab, device=device) * args.spread).bfloat16()
            floor = logits.nbytes / rate / 1e6
            for mode in MODES:
                case = {"op": "sample", "mode": mode, "rows": rows, "vocab": vocab, "spread": args.spread}
                times = measure(logits, mode, not args.no_reference) | {"floor_us": floor, "copy_tb_s": rate}
                print(json.dumps(case | {name: round(value, 2) for name, value in times.items()}), flush=True)


if __name__ == "__main__":
    main()
