"""LoRA training on this machine beside transformers + PEFT: one JSON line a case, the peer measured first.

    python benchmarks/training.py [--steps 3] [--shape smollm2-135m] [--only ragged|dense]

Random weights in the shape, rank 16 on all linear projections, float32 on the CPU, AdamW, clipping, nothing recomputed.
`ragged`: 32 rows of 24 to 480 tokens an update, the first 60 % of each masked; the peer pads rows in batches of 4.
`dense`: one batch of 4 rows of 512 tokens an update, all trained. Each engine runs in a process of its own, for its
peak memory. `floor` is what the update's products alone take, measured in the same call: of the frozen weights' is the
ceiling of `share_of_gemm`, with the adapters' and attention's that of `share_of_products`. `cpu_s` is user and system
time an update, which says more than the wall's where others use the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import training_floor

ROOT = Path(__file__).resolve().parents[1]
SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
        "max_position_embeddings": 2048,
    },
}
RANK = 16
MICRO_TOKENS = 2048
Row = tuple[list[int], int]  # ids, and how many of the first are masked


def rows(case: str, vocab: int, step: int) -> list[Row]:
    """The rows of one update."""
    draw = random.Random(step)
    if case == "dense":
        return [([draw.randrange(vocab) for _ in range(512)], 0) for _ in range(4)]
    lengths = [24 + round(456 * (i / 31) ** 2) for i in range(32)]
    draw.shuffle(lengths)
    return [([draw.randrange(vocab) for _ in range(n)], round(0.6 * n)) for n in lengths]


def trained(batch: list[Row]) -> int:
    """Tokens of the batch with a loss."""
    return sum(len(ids) - max(1, masked) for ids, masked in batch)


def peak_bytes() -> int:
    """The most that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def resident_bytes() -> int:
    """What this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure(update: Any, case: str, vocab: int, steps: int, base: int) -> dict[str, Any]:  # noqa: ANN401
    """`update` is given the rows of a step; the first is not counted."""
    update(rows(case, vocab, 0))
    rates, losses, spent = [], [], []
    for step in range(1, steps + 1):
        batch = rows(case, vocab, step)
        begin, busy = time.perf_counter(), time.process_time()
        losses.append(update(batch))
        rates.append(trained(batch) / (time.perf_counter() - begin))
        spent.append(time.process_time() - busy)
    return {
        "trained_tokens_s": round(statistics.median(rates), 1),
        "runs": [round(rate, 1) for rate in rates],
        "cpu_s": round(statistics.median(spent), 2),
        "peak_mib_above_weights": round((peak_bytes() - base) / 2**20),
        "losses": [round(loss, 5) for loss in losses],
    }


def run_peer(shape: str, case: str, steps: int) -> dict[str, Any]:
    """transformers + PEFT as their documentation has it: padded batches, a mean over an update's trained tokens."""
    import peft
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPES[shape])).float()
    base = resident_bytes()
    settings = peft.LoraConfig(r=RANK, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, settings).train()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)

    def update(batch: list[Row]) -> float:
        total, count = 0.0, trained(batch)
        for at in range(0, len(batch), 4):
            part = batch[at : at + 4]
            width = max(len(ids) for ids, _ in part)
            ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in part])
            mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in part])
            labels = ids.masked_fill(mask == 0, -100)
            for row, (_, masked) in zip(labels, part, strict=True):
                row[:masked] = -100
            loss = model(input_ids=ids, attention_mask=mask, labels=labels, num_items_in_batch=count).loss
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return total

    return measure(update, case, SHAPES[shape]["vocab_size"], steps, base)


def run_ours(shape: str, case: str, steps: int) -> dict[str, Any]:
    """The trainer's own parts: packed rows, the training pass, the learner."""
    import torch
    from lmesh_kernels.layers.packed_batch import Segment, pack_batch
    from lmesh_kernels.lora.initial import initial_adapter
    from lmesh_kernels.lora.peft_config import PeftConfig
    from lmesh_kernels.lora.trainable import TrainableAdapter
    from lmesh_kernels.models.config import ModelConfig
    from lmesh_kernels.models.decoder import Decoder
    from lmesh_kernels.models.parameters import Precision
    from lmesh_kernels.models.training import TrainingPass
    from lmesh_kernels.platforms.host_memory import keep_freed_memory
    from lmesh_trainer.learner import Learner
    from lmesh_trainer.optimiser import AdamW, Optimiser

    keep_freed_memory()
    told, cpu = SHAPES[shape], torch.device("cpu")
    config = ModelConfig(
        architecture="llama",
        vocab_size=told["vocab_size"],
        hidden_size=told["hidden_size"],
        intermediate_size=told["intermediate_size"],
        num_layers=told["num_hidden_layers"],
        num_heads=told["num_attention_heads"],
        num_kv_heads=told["num_key_value_heads"],
        head_dim=told["hidden_size"] // told["num_attention_heads"],
        rms_norm_eps=1e-6,
        max_position_embeddings=told["max_position_embeddings"],
        tie_word_embeddings=told["tie_word_embeddings"],
    )
    decoder = Decoder(config, dtype=torch.float32, device=cpu)
    decoder.arena.normal_(0.0, 0.02)
    base = resident_bytes()
    wanted = PeftConfig(r=RANK, alpha=32, target_modules="all-linear")
    adapter = TrainableAdapter(initial_adapter(wanted, config, seed=0), config, precision=Precision.FLOAT32, device=cpu)
    training = TrainingPass(decoder, adapters=adapter.products)
    learner = Learner(training, adapter.parameters, Optimiser(adapter.parameters, AdamW()), max_grad_norm=1.0)

    def update(batch: list[Row]) -> float:
        packs: list[list[Segment]] = [[]]
        for number, (ids, masked) in enumerate(batch):
            if sum(len(s.ids) for s in packs[-1]) + len(ids) > MICRO_TOKENS:
                packs.append([])
            weights = [0.0] * masked + [1.0] * (len(ids) - masked)
            packs[-1].append(Segment(row=number, ids=ids, weights=weights))
        return learner.update([pack_batch(pack, cpu) for pack in packs], step=0, rate=2e-4).loss

    return measure(update, case, config.vocab_size, steps, base)


def run_floor(shape: str, case: str, steps: int) -> dict[str, Any]:
    """What the update's products alone would take: `training_floor`."""
    batch = rows(case, SHAPES[shape]["vocab_size"], 1)
    lengths, width = [len(ids) for ids, _ in batch], min(MICRO_TOKENS, sum(len(ids) for ids, _ in batch))
    return training_floor.measure(SHAPES[shape], RANK, lengths, trained(batch), width, steps)


RUNNERS = {"peer": run_peer, "ours": run_ours, "floor": run_floor}


def main() -> None:
    """Each engine in a process of its own, the peer first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--only", choices=["ragged", "dense"])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        engine, case = args.run
        print(json.dumps(RUNNERS[engine](args.shape, case, args.steps)))
        return
    for case in [args.only] if args.only else ["ragged", "dense"]:
        found = {}
        for engine in RUNNERS:
            command = [sys.executable, __file__, "--run", engine, case, "--steps", str(args.steps)]
            environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
            done = subprocess.run(
                [*command, "--shape", args.shape], env=environment, stdout=subprocess.PIPE, text=True, check=True
            )
            found[engine] = json.loads(done.stdout.splitlines()[-1])
        ours, peer, floor = found["ours"], found["peer"], found["floor"]
        line = {
            "case": case,
            "shape": args.shape,
            "threads": args.threads,
            "ours": ours,
            "transformers+peft": peer,
            "floor": floor,
            "times_peer": round(ours["trained_tokens_s"] / peer["trained_tokens_s"], 2),
            "times_peer_cpu": round(peer["cpu_s"] / ours["cpu_s"], 2),
            "share_of_gemm": round(ours["trained_tokens_s"] / floor["gemm_tokens_s"], 2),
            "share_of_products": round(ours["trained_tokens_s"] / floor["products_tokens_s"], 2),
            "memory_share": round(ours["peak_mib_above_weights"] / peer["peak_mib_above_weights"], 2),
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
