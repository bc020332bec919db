"""The floor of a LoRA update on this CPU: its FLOP by product, and how long those products take through torch alone.

Each product at its shape in a microbatch and in the layout that is the fastest here, best of some runs. Elementwise
work is counted as bytes, of chains that read and write each tensor once, and timed by the rate of a copy.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

BLOCK = 64  # queries of attention's blocks
HEAD_ROWS = 512


def _best(run: Callable[[], object], times: int) -> float:
    """Seconds of the fastest of some runs, after one that is not counted."""
    run()
    found = []
    for _ in range(times):
        begin = time.perf_counter()
        run()
        found.append(time.perf_counter() - begin)
    return min(found)


def _product(height: int, inputs: int, outputs: int, times: int) -> float:
    """Seconds of x @ w, the faster of the plain and the packed layout."""
    x, w, y = torch.randn(height, inputs), torch.randn(inputs, outputs), torch.empty(height, outputs)
    turned = w.t().contiguous()
    ways: list[Callable[[], object]] = [lambda: torch.mm(x, w, out=y), lambda: torch.mm(x, turned.t(), out=y)]
    if torch.backends.mkldnn.is_available():
        packed = torch.ops.mkldnn._reorder_linear_weight(turned, height)
        ways.append(lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], ""))
    return min(_best(way, times) for way in ways)


def _attention(length: int, heads: int, kv_heads: int, head_dim: int, times: int) -> tuple[float, float]:
    """(FLOP, seconds) of the seven products of one row's attention, forward and backward, none above the diagonal."""
    rows = BLOCK * heads // kv_heads
    flop = seconds = 0.0
    for end in range(BLOCK, length + BLOCK, BLOCK):
        keys = min(end, length)
        q, k = torch.randn(kv_heads, rows, head_dim), torch.randn(kv_heads, keys, head_dim)
        scores, out, into = torch.randn(kv_heads, rows, keys), torch.empty_like(q), torch.empty_like(k)
        turned, tall = k.transpose(1, 2), scores.transpose(1, 2)
        made = torch.empty_like(scores)
        seconds += 3 * _best(lambda: torch.bmm(q, turned, out=made), times)  # noqa: B023 - run at once
        seconds += 2 * _best(lambda: torch.bmm(scores, k, out=out), times)  # noqa: B023
        seconds += 2 * _best(lambda: torch.bmm(tall, q, out=into), times)  # noqa: B023
        flop += 7 * 2 * kv_heads * rows * keys * head_dim
    return flop, seconds


def _adapters(products: list[tuple[int, list[int]]], rank: int, height: int, times: int) -> tuple[float, float]:
    """(FLOP, seconds) of one layer's adapters: three products of each factor."""
    flop = seconds = 0.0
    for inputs, parts in products:
        ranks = rank * len(parts)
        x, a, u = torch.randn(height, inputs), torch.randn(ranks, inputs), torch.randn(height, ranks)
        seconds += _best(lambda: torch.mm(x, a.t()), times)  # noqa: B023 - run at once
        seconds += _best(lambda: x.addmm_(u, a, alpha=1e-6), times)  # noqa: B023
        seconds += _best(lambda: a.addmm_(u.t(), x, alpha=1e-6), times)  # noqa: B023
        flop += 3 * 2 * height * inputs * ranks
        for outputs in parts:
            y, b, thin = torch.randn(height, outputs), torch.randn(outputs, rank), torch.randn(height, rank)
            seconds += _best(lambda: torch.mm(y, b), times)  # noqa: B023
            seconds += _best(lambda: y.addmm_(thin, b.t(), alpha=1e-6), times)  # noqa: B023
            seconds += _best(lambda: b.addmm_(y.t(), thin, alpha=1e-6), times)  # noqa: B023
            flop += 3 * 2 * height * outputs * rank
    return flop, seconds


def _elementwise_bytes(hidden: int, wide: int, qkv: int, layers: int, tokens: int) -> float:
    """Of norms, rotation, activation and residual, each one pass forward and one backward, read and written."""
    norms = 2 * (2 + 2 + 4)  # forward; made again; gradient, with what it is added to
    activation = 3 + 6  # forward; gate, up, gradient in, and three out
    return 4.0 * tokens * layers * (norms * hidden + activation * wide + 4 * qkv)


def _copy_rate(times: int) -> float:
    """Bytes a second, read and written, of a copy that no cache holds."""
    here, there = torch.zeros(1 << 26), torch.zeros(1 << 26)
    return 2 * here.nbytes / _best(lambda: there.copy_(here), times)


def measure(
    shape: dict[str, Any], rank: int, lengths: list[int], trained: int, height: int, times: int
) -> dict[str, Any]:
    """FLOP and seconds of an update of rows of `lengths`, of whose tokens `trained` have a loss."""
    hidden, wide, layers = shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]
    heads, kv_heads = shape["num_attention_heads"], shape["num_key_value_heads"]
    head_dim, tokens = hidden // heads, sum(lengths)
    kv = kv_heads * head_dim
    fused = [(hidden, [hidden, kv, kv]), (hidden, [hidden]), (hidden, [wide, wide]), (wide, [hidden])]
    flop, seconds = dict.fromkeys(("frozen", "head", "adapters", "attention"), 0.0), {}
    share = layers * tokens / height
    seconds["frozen"] = share * sum(
        _product(height, i, sum(o), times) + _product(height, sum(o), i, times) for i, o in fused
    )
    flop["frozen"] = layers * sum(4.0 * tokens * i * sum(o) for i, o in fused)
    vocab, part = shape["vocab_size"], min(HEAD_ROWS, trained)
    seconds["head"] = (_product(part, hidden, vocab, times) + _product(part, vocab, hidden, times)) * trained / part
    flop["head"] = 4.0 * trained * hidden * vocab
    one, took = _adapters(fused, rank, height, times)
    flop["adapters"], seconds["adapters"] = share * one, share * took
    known = {n: _attention(n, heads, kv_heads, head_dim, times) for n in set(lengths)}
    flop["attention"] = layers * sum(known[n][0] for n in lengths)
    seconds["attention"] = layers * sum(known[n][1] for n in lengths)
    moved = _elementwise_bytes(hidden, wide, hidden + 2 * kv, layers, tokens)
    return {
        "gflop": {name: round(count / 1e9, 1) for name, count in flop.items()},
        "seconds": {name: round(took, 3) for name, took in seconds.items()},
        "elementwise_gb": round(moved / 1e9, 2),
        "elementwise_s": round(moved / _copy_rate(times), 3),
        "gemm_tokens_s": round(trained / (seconds["frozen"] + seconds["head"]), 1),
        "products_tokens_s": round(trained / sum(seconds.values()), 1),
    }
