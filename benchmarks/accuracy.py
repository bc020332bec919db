"""How right a device's lower precision is: `python benchmarks/accuracy.py --model llama-1b`.

`--model`: a shape with random weights, teacher-forced in the device's dtype beside transformers' own model of the same
weights, in float32 and in that dtype. What the dtype moves a position's logits by is the root mean square, over the
vocabulary, of what transformers' own run in it is off. Sure is a position whose two likeliest ids are more than three
times that apart: `sure_share` of all. Of those `agreed_share` have the id of float32 here, `peer_agreed_share` in
transformers' own run (the noise of two logits can be three times that of one, so neither is quite 1), and of those
more than five times apart all must. `error_ratio` is our logits' error over transformers'. `--path`: perplexity of a
text in the dtype and in float32, and how far they are apart. The exit status is 1 where we are off by more than
transformers, an id disagrees five times apart, too few are sure, or perplexities are more than 0.3 % apart.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lmesh_kernels.layers.attention import PagedAttention
from lmesh_kernels.layers.batch import PagedBatch
from lmesh_kernels.layers.kv_cache import KVCache
from lmesh_kernels.models.decoder import Decoder
from lmesh_kernels.models.registry import load_model
from lmesh_kernels.platforms import detect
from lmesh_kernels.text.resolve import local_files, resolve
from lmesh_kernels.text.tokenizer import load_tokenizer
from shapes import save_shape
from torch import Tensor
from transformers_peer import twin_of

ROW = 512  # positions of one sequence
BLOCK = 64
SURE, BEYOND_DOUBT = 3.0, 5.0  # margins, in what the dtype moves a logit by
LEAST_SURE = 0.6
MOST_ERROR = 1.05  # of transformers'
MOST_APART = 0.003


def main() -> None:
    """Parses the command line and measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help="a shape of shapes.py: llama-1b, llama-8b, qwen3-0.6b, tiny")
    what.add_argument("--path", help="any source that `lmesh up` takes")
    parser.add_argument("--text", type=Path, help="a file whose perplexity is taken, with --path")
    parser.add_argument("--positions", type=int, default=4096)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    args = parser.parse_args()
    if (args.path is None) != (args.text is None):
        parser.error("--path and --text go together")
    if args.model and args.dtype == "float32":
        parser.error("--model is compared with float32: --dtype must be lower")
    platform = detect(args.device)
    dtype = getattr(torch, args.dtype)
    with torch.inference_mode():
        if args.model:
            found, good = greedy(args.model, args.positions, platform.device, dtype)
        else:
            found, good = perplexities(args.path, args.text, args.positions, platform.device, dtype)
    print(json.dumps({"dtype": args.dtype, "device": platform.describe().name, **found}))
    sys.exit(0 if good else 1)


def logits_of(decoder: Decoder, rows: Sequence[Sequence[int]]) -> Iterator[Tensor]:
    """Float32 logits [n, vocab] of each row, through the paged cache as a prompt goes."""
    longest = max(map(len, rows))
    kv = KVCache(decoder.config, -(-longest // BLOCK) + 1, BLOCK, decoder.dtype, decoder.arena.device)
    attention = PagedAttention(kv)
    blocks = torch.arange(kv.num_blocks - 1, dtype=torch.int32, device=kv.data.device)[None]
    for ids in rows:
        places = torch.arange(len(ids), device=kv.data.device)
        batch = PagedBatch(
            ids=torch.tensor(ids, device=kv.data.device),
            positions=places,
            kv_slots=places,
            block_tables=blocks,
            num_decodes=int(len(ids) == 1),
            q_lens_host=(len(ids),),
            kv_lens_host=(len(ids),),
        )
        yield decoder.logits(decoder.forward(batch, attention))


def greedy(shape: str, positions: int, device: torch.device, dtype: torch.dtype) -> tuple[dict[str, Any], bool]:
    """Ids of random weights beside transformers'."""
    with tempfile.TemporaryDirectory(prefix="lmesh-shape-") as folder:
        files = local_files(save_shape(Path(folder), shape, tokenizer=False))
        decoder = load_model(files, dtype=dtype, device=device, load_format="dummy")
        low, high = twin_of(decoder, files.path), twin_of(decoder, files.path).float()
    draw, vocab = random.Random(0), decoder.config.vocab_size
    row = min(ROW, decoder.config.max_position_embeddings)
    rows = [[draw.randrange(vocab) for _ in range(row)] for _ in range(-(-positions // row))]
    seen = Agreement()
    for ids, ours in zip(rows, logits_of(decoder, rows), strict=True):
        told = torch.tensor([ids], device=device)
        seen.take(ours.float(), low(told).logits[0].float(), high(told).logits[0].float())
    return {"model": shape, **seen.line()}, seen.good


@dataclass(slots=True)
class Agreement:
    """Counts of positions, and sums of squared errors, ours and transformers'."""

    total: int = 0
    sure: int = 0
    agreed: int = 0
    peer_agreed: int = 0
    wrong_beyond_doubt: int = 0
    error: float = 0.0
    peer_error: float = 0.0

    def take(self, ours: Tensor, peer: Tensor, exact: Tensor) -> None:
        """Logits [n, vocab] of the same positions, all float32."""
        best = exact.topk(2, dim=-1)
        moved = (peer - exact).square().mean(dim=-1).sqrt()
        margin = (best.values[:, 0] - best.values[:, 1]) / moved
        right, peer_right = (logits.argmax(-1) == best.indices[:, 0] for logits in (ours, peer))
        sure = margin > SURE
        self.total += len(exact)
        self.sure += int(sure.sum())
        self.agreed += int((right & sure).sum())
        self.peer_agreed += int((peer_right & sure).sum())
        self.wrong_beyond_doubt += int((~right & (margin > BEYOND_DOUBT)).sum())
        self.error += float((ours - exact).square().mean(dim=-1).sum())
        self.peer_error += float(moved.square().sum())

    @property
    def error_ratio(self) -> float:
        """Our root mean square error over transformers'."""
        return math.sqrt(self.error / self.peer_error)

    @property
    def good(self) -> bool:
        """Whether we are as right as transformers."""
        return not self.wrong_beyond_doubt and self.error_ratio <= MOST_ERROR and self.sure >= LEAST_SURE * self.total

    def line(self) -> dict[str, float]:
        """For a JSON line."""
        sure = max(1, self.sure)
        return {
            "positions": self.total,
            "sure_share": round(self.sure / self.total, 4),
            "agreed_share": round(self.agreed / sure, 5),
            "peer_agreed_share": round(self.peer_agreed / sure, 5),
            "wrong_beyond_doubt": self.wrong_beyond_doubt,
            "error_ratio": round(self.error_ratio, 4),
        }


def perplexities(
    source: str, text: Path, positions: int, device: torch.device, dtype: torch.dtype
) -> tuple[dict[str, Any], bool]:
    """Of a text's first positions, in rows of their own."""
    files = resolve(source)
    ids = load_tokenizer(files).encode(text.read_text(), add_special_tokens=False)[:positions]
    rows = [row for at in range(0, len(ids), ROW) if len(row := ids[at : at + ROW]) > 1]
    found = {
        name: perplexity(load_model(files, dtype=kind, device=device), rows)
        for name, kind in (("perplexity", dtype), ("perplexity_float32", torch.float32))
    }
    apart = found["perplexity"] / found["perplexity_float32"] - 1
    told = {"model": source, "positions": sum(map(len, rows)), **found, "apart": apart}
    return told, abs(apart) <= MOST_APART


def perplexity(decoder: Decoder, rows: Sequence[Sequence[int]]) -> float:
    """Exponential of the mean negative log-likelihood of all ids but each row's first."""
    total = count = 0.0
    for ids, logits in zip(rows, logits_of(decoder, rows), strict=True):
        targets = torch.tensor(ids[1:], device=logits.device)
        total -= float(logits[:-1].log_softmax(-1).gather(1, targets[:, None]).double().sum())
        count += len(targets)
    return math.exp(total / count)


if __name__ == "__main__":
    main()
