"""Paged attention on a device: `python kernels/benchmarks/paged_attention.py`; one JSON line a case, in bfloat16.

Times are medians of graph replays over several layers' caches, in microseconds a layer. `floor_us` of decodes is
reading all keys and values once at the rate of a copy in the same run; prompts have `tflop_s` instead, beside torch's
kernels. `--tiles` tries other tiles.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from typing import Any

import numpy as np
import torch
from lmesh_kernels.ops.attention_work import on_device, plan_pieces
from lmesh_kernels.ops.device_attention import DeviceAttention, Tile
from sample import copy_tb_s, event_ms, replay_us
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

BLOCK = 64
MODELS = {"llama-1b": (32, 8, 64), "llama-8b": (32, 8, 128), "qwen3-0.6b": (16, 8, 128)}
CACHED = 200 << 20  # bytes that all caches of a case have together at least: more than a device keeps near


def ragged(count: int, low: int, high: int) -> list[int]:
    """The same lengths in every run."""
    draw = random.Random(count)
    return [draw.randint(low, high) for _ in range(count)]


DECODES = {
    "1x700": [700],
    "8 ragged": ragged(8, 300, 1500),
    "64 ragged": ragged(64, 200, 1800),
    "256 ragged": ragged(256, 200, 1800),
    "1x32000": [32000],
}
PROMPTS = {"8192": ([8192], [8192]), "16x512": ([512] * 16, [512] * 16), "32x128 after 4096": ([128] * 32, [4224] * 32)}
SHARED = 4096


class Case:
    """Sequences over scattered blocks, in as many layers as `CACHED` asks for."""

    def __init__(self, model: str, q_lens: list[int], kv_lens: list[int], shared: int = 0) -> None:
        self.heads, self.kv_heads, self.head_dim = MODELS[model]
        self.q_lens, self.kv_lens, self.shared = np.array(q_lens, np.int32), np.array(kv_lens, np.int32), shared
        counts, common = [-(-n // BLOCK) for n in kv_lens], shared // BLOCK
        free = torch.randperm(common + sum(n - common for n in counts)).tolist()
        blocks, prefix = len(free), [free.pop() for _ in range(common)]
        self.tables = np.zeros((len(counts), max(counts)), np.int32)
        for row, count in enumerate(counts):
            self.tables[row, :count] = prefix + [free.pop() for _ in range(count - common)]
        size = 2 * blocks * BLOCK * self.kv_heads * self.head_dim * 2
        shape = (2, blocks, BLOCK, self.kv_heads, self.head_dim)
        layers = max(1, min(8, CACHED // size + 1))
        self.layers = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(layers)]
        self.q = torch.randn(sum(q_lens), self.heads, self.head_dim, device="cuda", dtype=torch.bfloat16)

    def us(self, tiles: dict[str, Tile]) -> float:
        """Microseconds a layer."""
        group = self.heads // self.kv_heads
        attention = DeviceAttention(
            self.q.device, kv_heads=self.kv_heads, group=group, head_dim=self.head_dim, dtype=self.q.dtype
        )
        for name, tile in tiles.items():
            setattr(attention, name, tile)
        groups = ((0, len(self.q_lens), self.shared),) if self.shared else ()
        pieces = plan_pieces(self.q_lens, self.kv_lens, attention.shape, groups=groups)
        work = on_device(pieces, lambda values: torch.from_numpy(np.ascontiguousarray(values)).cuda())
        tables, scale = torch.from_numpy(self.tables).cuda(), self.head_dim**-0.5

        def layers() -> None:
            for keys, values in self.layers:
                attention.attend(self.q, keys, values, tables, work, scale=scale)

        return float(replay_us(layers)) / len(self.layers)

    @property
    def operations(self) -> float:
        """Of the scores and the sums, causal."""
        q, kv = self.q_lens.astype(float), self.kv_lens.astype(float)
        return float((4 * self.heads * self.head_dim * (q * (kv - q) + q * (q + 1) / 2)).sum())


def peer_tflop_s(model: str, length: int, backend: SDPBackend) -> float:
    """Torch's own kernel on one prompt."""
    heads, kv_heads, head_dim = MODELS[model]

    def draw(count: int) -> Tensor:
        return torch.randn(1, count, length, head_dim, device="cuda", dtype=torch.bfloat16)

    q, k, v = draw(heads), draw(kv_heads), draw(kv_heads)
    with sdpa_kernel(backend):
        scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        ms = min(
            event_ms(lambda: scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)) for _ in "12345"
        )
    return 2 * heads * head_dim * length**2 / float(ms) / 1e9


def tiles_of(tried: bool) -> list[dict[str, Tile]]:
    """None of its own, or a few others of both kinds."""
    if not tried:
        return [{}]
    narrow = [Tile(rows=16, keys=k, warps=4, stages=s) for k, s in itertools.product((64, 128), (2, 3))]
    return [{"narrow": tile} for tile in narrow]


def main() -> None:
    """Parses the command line and measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--tiles", action="store_true", help="try other tiles of decodes")
    args = parser.parse_args()
    copy = copy_tb_s(torch.device("cuda"))
    for model, told in itertools.product(args.model, tiles_of(args.tiles)):
        line: dict[str, Any] = {"model": model, "copy_tb_s": round(copy, 2), **{n: str(t) for n, t in told.items()}}
        for name, lens in DECODES.items():
            case = Case(model, [1] * len(lens), lens)
            floor = sum(lens) * case.kv_heads * case.head_dim * 4 / copy / 1e6
            print(json.dumps(line | {"case": name, "us": round(case.us(told), 1), "floor_us": round(floor, 1)}))
        for shared in (0, SHARED):
            case = Case(model, [1] * 64, ragged(64, SHARED + 140, SHARED + 190), shared)
            print(json.dumps(line | {"case": f"64 over {SHARED}, shared {shared}", "us": round(case.us(told), 1)}))
        for name, (q_lens, kv_lens) in ({} if told else PROMPTS).items():
            case = Case(model, q_lens, kv_lens)
            print(json.dumps(line | {"case": name, "tflop_s": round(case.operations / case.us(told) / 1e6)}))
        for backend in () if told else (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
            found = peer_tflop_s(model, 8192, backend)
            print(json.dumps(line | {"case": "8192", "peer": backend.name, "tflop_s": round(found)}), flush=True)


if __name__ == "__main__":
    main()
