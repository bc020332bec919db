"""Products of a decode step beside cuBLAS, in CUDA graphs over weights of several times the cache.

    python kernels/benchmarks/linear.py [--models llama-1b ...] [--rows 1 16 64 128 256] [--search | --layers]

One JSON line a case: microseconds, TB/s of weights, and the same for cuBLAS' product alone (without norm, silu and mul,
which the fused ops also do), with the copy rate of the same run. `--search` gives a line a tile instead, fastest first.
`--layers` gives a line a model: one row through all products of a layer, without attention, for what a kernel's end
costs the next one.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import torch
from lmesh_kernels.ops.gated_linear import gated_linear, norm_gated_linear
from lmesh_kernels.ops.linear import linear
from lmesh_kernels.ops.linear_row_kernels import normed_row_product, row_product
from lmesh_kernels.ops.linear_tile_kernels import tile_product
from lmesh_kernels.ops.linear_tiles import NormTile, ProductTile, RowTile, device_facts
from lmesh_kernels.ops.norm_linear import norm_linear
from torch import Tensor

# hidden, attention's width, qkv, intermediate, vocabulary
MODELS = {
    "llama-1b": (2048, 2048, 3072, 8192, 128256),
    "llama-8b": (4096, 4096, 6144, 14336, 128256),
    "llama-70b": (8192, 8192, 10240, 28672, 128256),
    "qwen3-0.6b": (1024, 2048, 4096, 3072, 151936),
    "qwen3-14b": (5120, 5120, 7168, 17408, 151936),
}
WEIGHT_BYTES = 300e6  # of all copies of a matrix together; an H200's cache has 60e6
Call = Callable[[Tensor], object]


def event() -> torch.cuda.Event:
    """A point in a stream that knows its time."""
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def microseconds(calls: list[Callable[[], object]], replays: int = 6) -> float:
    """Of one call, in a graph of all of them: median of five."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin()
        for call in calls:
            call()
        graph.capture_end()
        graph.replay()
        times = []
        for _ in range(5):
            begin, end = event(), event()
            begin.record()
            for _ in range(replays):
                graph.replay()
            end.record()
            stream.synchronize()
            times.append(begin.elapsed_time(end) * 1e3 / replays / len(calls))
    return float(statistics.median(times))


def copy_rate() -> float:
    """TB/s of a large copy, read and written; outside a graph, where it is no kernel but a slower engine's."""
    source = torch.randn(2**29, device="cuda")
    target = torch.empty_like(source)
    begin, end = event(), event()
    target.copy_(source)
    begin.record()
    for _ in range(20):
        target.copy_(source)
    end.record()
    torch.cuda.synchronize()
    return float(20 * 2 * source.nbytes / begin.elapsed_time(end) / 1e9)


def normal(*shape: int) -> Tensor:
    """Random bfloat16 of about a model's size; never zeros, on which a device is faster."""
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16) * 0.05


def shapes(model: str) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of a model's products."""
    hidden, width, qkv, inner, vocabulary = MODELS[model]
    return {
        "qkv": (qkv, hidden),
        "out": (hidden, width),
        "gate_up": (2 * inner, hidden),
        "down": (hidden, inner),
        "head": (vocabulary, hidden),
    }


def ops(name: str, rows: int, outputs: int, inputs: int) -> Iterator[tuple[str, object, Call]]:
    """Our ops on a product of that name, each as a function of its weights; they choose their tiles."""
    x, residual, scale = normal(rows, inputs), normal(rows, inputs), normal(inputs)
    y, half, total = normal(rows, outputs), normal(rows, outputs // 2), normal(rows, inputs)
    yield "linear", None, lambda w: linear(x, w, out=y)
    if name == "gate_up":
        yield "gated_linear", None, lambda w: gated_linear(x, w, out=half)
        if rows == 1:
            yield (
                "norm_gated_linear",
                None,
                lambda w: norm_gated_linear(x, residual, scale, 1e-5, w, out=half, total=total),
            )
    elif name in ("qkv", "head") and rows == 1:
        yield "norm_linear", None, lambda w: norm_linear(x, residual, scale, 1e-5, w, out=y, total=total)
    yield "linear, batch-invariant", None, lambda w: linear(x, w, out=y, batch_invariant=True)


def tiles(name: str, rows: int, outputs: int, inputs: int) -> Iterator[tuple[str, object, Call]]:
    """Every tile worth a try: op, tile, and its launch as a function of the weights."""
    facts = device_facts(torch.device("cuda", torch.cuda.current_device()))
    x, residual, scale = normal(rows, inputs), normal(rows, inputs), normal(inputs)
    y, half, total = normal(rows, outputs), normal(rows, outputs // 2), normal(rows, inputs)

    def normed(w: Tensor, tile: NormTile, out: Tensor, gated: bool) -> None:
        normed_row_product(x, residual, scale, 1e-5, w, None, out, total, tile, gated=gated, pdl=facts.pdl)

    if rows == 1:
        waves = [
            (1.0, 1),
            *product((0.5, 0.7, 0.8), (1, 2, 4)),
        ]  # the first's share, and steps after it
        for row in map(RowTile._make, product((1, 2, 4, 8, 16), (512, 1024, 2048), (4, 8))):
            yield "linear", row, partial(row_product, x, bias=None, out=y, tile=row, pdl=facts.pdl)
        for height, at_once, (first, later) in product((1, 2, 4, 8), (2, 4), waves):
            wave = at_once * facts.processors
            steps = math.ceil(first * (outputs // 2 if name == "gate_up" else outputs) / (height * wave))
            tile = NormTile(height, wave, steps, later)
            if name == "qkv":
                yield "norm_linear", tile, partial(normed, tile=tile, out=y, gated=False)
            elif name == "gate_up":
                yield "norm_gated_linear", tile, partial(normed, tile=tile, out=half, gated=True)
        return
    for gated in (False, True) if name == "gate_up" else (False,):
        for m, n, k, warps, stages, swapped in product(
            (16, 64, 128), (32, 64, 128), (64, 128, 256), (4, 8), (3, 4, 5), (False, True)
        ):
            block = ProductTile(m, n, k, warps, stages, swapped)
            held = 2 * k * (m + n * (2 if gated else 1)) * stages
            # The left factor fills the matrix unit's 64 rows a group of four warps; under 16 KiB a stage is too little.
            whole = (n if swapped else m) >= 16 * warps and m <= max(16, 2 * rows)
            if whole and stages * 12288 <= held < facts.shared_bytes - 1024:
                out = half if gated else y
                call = partial(tile_product, x, bias=None, out=out, tile=block, gated=gated, pdl=facts.pdl)
                yield "gated_linear" if gated else "linear", block, call


def layers(model: str) -> tuple[int, list[Callable[[], object]]]:
    """Bytes of a layer's products, and calls of layers in a row: each takes the row that the one before it gave."""
    sizes = [shapes(model)[name] for name in ("qkv", "out", "gate_up", "down")]
    hidden, width = sizes[1]
    layer_bytes = sum(2 * outputs * inputs for outputs, inputs in sizes)
    weights = [[normal(*size) for size in sizes] for _ in range(max(3, math.ceil(2 * WEIGHT_BYTES / layer_bytes)))]
    first, second = normal(hidden), normal(hidden)
    begin = [normal(1, hidden), normal(1, hidden)]
    stream = list(begin)

    def run(nth: int) -> None:
        qkv, out, gate_up, down = weights[nth]
        x, residual = stream if nth else begin
        y, residual = norm_linear(x, residual, first, 1e-5, qkv)
        y, residual = norm_gated_linear(linear(y[:, :width], out), residual, second, 1e-5, gate_up)
        stream[:] = linear(y, down), residual

    return layer_bytes, [partial(run, nth) for nth in range(len(weights))]


def main() -> None:
    """Runs the cases asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--products", nargs="+", default=["qkv", "out", "gate_up", "down", "head"])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 16, 64, 128, 256])
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--search", action="store_true")
    kind.add_argument("--layers", action="store_true")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    copied = copy_rate()
    if arguments.layers:
        for model in arguments.models:
            size, calls = layers(model)
            us = microseconds(calls)
            share = round(size / us / 1e6 / copied, 3)
            line = {"model": model, "us_a_layer": round(us, 2), "tb_s": round(size / us / 1e6, 3)}
            print(json.dumps(line | {"copy_tb_s": round(copied, 2), "share_of_copy": share}), flush=True)
        return
    for model, name in product(arguments.models, arguments.products):
        measure(model, name, arguments.rows, copied, search=arguments.search)


def measure(model: str, name: str, all_rows: list[int], copied: float, *, search: bool) -> None:
    """Prints the lines of one of a model's products."""
    outputs, inputs = shapes(model)[name]
    size = 2 * outputs * inputs
    weights = [normal(outputs, inputs) for _ in range(max(2, min(40, math.ceil(WEIGHT_BYTES / size))))] * 2
    for rows in all_rows:
        x, y = normal(rows, inputs), normal(rows, outputs)
        library = microseconds([partial(torch.mm, x, w.T, out=y) for w in weights])
        case = {"model": model, "product": name, "outputs": outputs, "inputs": inputs, "rows": rows}
        lines = []
        for op, tile, call in (tiles if search else ops)(name, rows, outputs, inputs):
            ours = microseconds([partial(call, w) for w in weights])
            line = {"op": op, **case, "us": round(ours, 2), "tb_s": round(size / ours / 1e6, 3)}
            line |= {"cublas_us": round(library, 2), "cublas_tb_s": round(size / library / 1e6, 3)}
            line |= {"copy_tb_s": round(copied, 2), "share_of_copy": round(size / ours / 1e6 / copied, 3)}
            lines.append(line if tile is None else line | {"tile": str(tile)})
        if search:
            lines.sort(key=lambda line: (line["op"], line["us"]))
        for line in lines:
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
