"""How right a device's lower precision is: `python benchmarks/accuracy.py --model llama-1b`.

`--model`: a shape with random weights, teacher-forced in the device's dtype beside transformers' own model of the same
weights. Ids must agree wherever transformers itself is sure of them: where the margin between the two likeliest ids in
float32 is more than three times what its own run in the dtype moves them by. `sure_share` of positions are so,
`agreed_share` of those agree. `--path`: perplexity of a text in the dtype and in float32, and how far they are apart.
The exit status is 1 where ids disagree, too few are sure, or perplexities are more than 0.3 % apart.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
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
SURE = 3.0  # margins, in what the dtype moves them by
LEAST_SURE = 0.6
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
    sure = agreed = 0
    for ids, ours in zip(rows, logits_of(decoder, rows), strict=True):
        told = torch.tensor([ids], device=device)
        exact, rounded = high(told).logits[0].float(), low(told).logits[0].float()
        best = exact.topk(2, dim=-1)
        moved = (rounded.gather(1, best.indices) - best.values).abs().amax(dim=-1)
        certain = best.values[:, 0] - best.values[:, 1] > SURE * moved
        sure += int(certain.sum())
        agreed += int((ours.argmax(-1) == best.indices[:, 0])[certain].sum())
    total = len(rows) * row
    found = {"model": shape, "positions": total, "sure_share": sure / total, "agreed_share": agreed / max(1, sure)}
    return found, agreed == sure and sure >= LEAST_SURE * total


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
