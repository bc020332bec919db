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
from functools import partial
from pathlib import Path

import torch
from lmesh_kernels import platforms
from lmesh_kernels.models.config import load_config
from lmesh_kernels.models.decoder import Decoder
from lmesh_kernels.models.dummy import fill_dummy
from lmesh_kernels.models.safetensors_folder import read_safetensors, safetensors_files, stored_tensors
from lmesh_kernels.models.staged_reads import PIECE_BYTES, THREADS, StagedReads
from lmesh_kernels.models.weights import bind, bindings
from lmesh_kernels.text.resolve import local_files
from safetensors.torch import save_file
from shapes import save_shape

_PLAIN_BYTES = 16 << 20  # of one read call


def main() -> None:
    """Parses the command line and measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-1b", help="a shape of shapes.py")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="in the files")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--threads", type=int, nargs="*", default=[THREADS])
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lmesh-load-") as name:
        Loading(args, Path(name)).run()


class Loading:
    """A made-up checkpoint in `folder`, and the decoder that it came from."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self._args, self._folder = args, save_shape(folder, args.model, tokenizer=False)
        self._platform = platforms.detect(args.device)
        model = load_config(local_files(folder))
        self._decoder = Decoder(model, dtype=torch.bfloat16, device=self._platform.device)
        fill_dummy(self._decoder)
        self._wanted = {name: slot.clone() for name, slot in self._decoder.named_buffers()}
        save(self._decoder, folder, getattr(torch, args.dtype), args.shards)
        self._bytes = sum(path.stat().st_size for path in safetensors_files(folder))

    def run(self) -> None:
        """All ways, one after the other."""
        decoder, folder = self._decoder, self._folder
        self._time("plain read", lambda: _read_plainly(folder), loads=False)
        self._time("mapped, tensor by tensor", lambda: bind(decoder, read_safetensors(folder)))
        for threads in self._args.threads:
            self._time(f"{threads} threads, {2 * threads * PIECE_BYTES >> 20} MiB", partial(self._staged, threads))
        self._time("random on the device", lambda: fill_dummy(decoder))

    def _staged(self, threads: int) -> None:
        with StagedReads(self._platform, threads=threads) as reads:
            bind(self._decoder, stored_tensors(self._folder), reads)

    def _time(self, way: str, act: Callable[[], object], *, loads: bool = True) -> None:
        """Prints a way's line. One that loads must have brought every value."""
        times = []
        for _ in range(self._args.runs):
            self._decoder.arena.fill_(torch.nan)
            self._synchronise()
            begin = time.perf_counter()
            act()
            self._synchronise()
            times.append(time.perf_counter() - begin)
        wrong = [name for name, slot in self._decoder.named_buffers() if not torch.equal(slot, self._wanted[name])]
        if loads and wrong:
            raise SystemExit(f"{way}: wrong values in {wrong[:3]}")
        took = statistics.median(times)
        line = {"way": way, "gb_s": round(self._bytes / took / 1e9, 2), "seconds": round(took, 3)}
        line |= {"first_s": round(times[0], 3), "gb": round(self._bytes / 1e9, 2)}
        print(json.dumps(line | {"model": self._args.model, "stored": self._args.dtype}), flush=True)

    def _synchronise(self) -> None:
        if self._platform.device.type == "cuda":
            torch.cuda.synchronize()


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


def _read_plainly(folder: Path) -> None:
    buffer = bytearray(_PLAIN_BYTES)
    for path in safetensors_files(folder):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


if __name__ == "__main__":
    main()
