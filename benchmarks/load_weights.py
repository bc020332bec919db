"""How fast a checkpoint reaches the device: `python benchmarks/load_weights.py --model llama-1b`; one JSON line a way.

Saves random weights of a shape as safetensors shards in a temporary folder, so they lie in the page cache, then times:
a plain read of the files by one thread, tensor by tensor through the mapped files (as the CPU loads), threads with
staging memory (as accelerators load), and random weights made on the device. Gigabytes a second of the files' bytes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from lmesh_kernels import platforms
from lmesh_kernels.models.config import load_config
from lmesh_kernels.models.decoder import Decoder
from lmesh_kernels.models.dummy import fill_dummy
from lmesh_kernels.models.safetensors_folder import read_safetensors, safetensors_files, stored_tensors
from lmesh_kernels.models.staged_reads import PIECE_BYTES, THREADS, StagedReads
from lmesh_kernels.models.weights import bind, bindings
from lmesh_kernels.platforms.platform import Platform
from lmesh_kernels.text.resolve import local_files
from safetensors.torch import save_file
from shapes import save_shape

_PLAIN_BYTES = 16 << 20  # of one read call


def main() -> None:
    """Parses the command line and measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-1b", help="a shape of shapes.py")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"], help="in the files")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--threads", type=int, nargs="*", default=[THREADS])
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    platform = platforms.detect(args.device)
    with tempfile.TemporaryDirectory(prefix="lmesh-load-") as name:
        folder = save_shape(Path(name), args.model, tokenizer=False)
        decoder = Decoder(load_config(local_files(folder)), dtype=torch.bfloat16, device=platform.device)
        fill_dummy(decoder)
        save(decoder, folder, getattr(torch, args.dtype), args.shards)
        size = sum(path.stat().st_size for path in safetensors_files(folder))

        def say(way: str, act: Callable[[], object]) -> None:
            times = [_timed(platform, act) for _ in range(args.runs)]
            took = statistics.median(times)
            line = {
                "way": way,
                "gb_s": round(size / took / 1e9, 2),
                "seconds": round(took, 3),
                "gb": round(size / 1e9, 2),
            }
            print(
                json.dumps(line | {"first_s": round(times[0], 3), "model": args.model, "stored": args.dtype}),
                flush=True,
            )

        say("plain read", lambda: _read_plainly(folder))
        say("mapped, tensor by tensor", lambda: bind(decoder, read_safetensors(folder)))
        for threads in args.threads:
            say(
                f"{threads} threads, {2 * threads * PIECE_BYTES >> 20} MiB",
                lambda n=threads: _staged(decoder, folder, platform, n),
            )
        say("random on the device", lambda: fill_dummy(decoder))


def save(decoder: Decoder, folder: Path, dtype: torch.dtype, shards: int) -> None:
    """The decoder's weights as a Hugging Face checkpoint in so many files."""
    slots = dict(decoder.named_buffers())
    places = {name: place for name, place in bindings(decoder.config).items() if not place.duplicate}
    table = {name: f"model-{index % shards + 1}.safetensors" for index, name in enumerate(places)}
    for shard in sorted(set(table.values())):
        mine = {name: place for name, place in places.items() if table[name] == shard}
        save_file(
            {n: slots[p.slot][p.start : p.start + p.rows].to("cpu", dtype).contiguous() for n, p in mine.items()},
            folder / shard,
        )
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))


def _staged(decoder: Decoder, folder: Path, platform: Platform, threads: int) -> None:
    with StagedReads(platform, threads=threads) as reads:
        bind(decoder, stored_tensors(folder), reads)


def _read_plainly(folder: Path) -> None:
    buffer = bytearray(_PLAIN_BYTES)
    for path in safetensors_files(folder):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def _timed(platform: Platform, act: Callable[[], object]) -> float:
    begin = time.perf_counter()
    act()
    if platform.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
