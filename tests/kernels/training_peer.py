"""The training pass beside transformers and PEFT: the same rows, one at a time there and packed here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from lmesh_kernels.layers.packed_batch import PackedBatch, Segment, pack_batch
from lmesh_kernels.layers.recompute import Recompute
from lmesh_kernels.lora.peft_files import read_adapter
from lmesh_kernels.lora.trainable import TrainableAdapter
from lmesh_kernels.models.decoder import Decoder
from lmesh_kernels.models.parameters import Parameters, Precision
from lmesh_kernels.models.registry import load_model
from lmesh_kernels.models.training import TrainingPass
from lmesh_kernels.ops.trained import Trained
from lmesh_kernels.text.resolve import resolve
from torch import Tensor, nn

CPU = torch.device("cpu")
LENGTHS = (7, 1, 33, 12, 2)


def rows(vocab: int, lengths: tuple[int, ...] = LENGTHS, *, seed: int = 0) -> list[Segment]:
    """Random rows, the first third of each masked, one weight that is neither 0 nor 1."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number, length in enumerate(lengths):
        ids = torch.randint(vocab, (length,), generator=generator).tolist()
        weights = [0.0 if i < length // 3 else 1.0 for i in range(length)]
        weights[-1] = 0.5
        found.append(Segment(row=number, ids=ids, weights=weights))
    return found


def batch(segments: list[Segment]) -> PackedBatch:
    return pack_batch(segments, CPU)


def peer_loss(peer: nn.Module, segments: list[Segment]) -> Tensor:
    """Weighted sum of -log p over all rows, [] float64, differentiable."""
    total = torch.zeros((), dtype=torch.float64)
    for segment in segments:
        ids = torch.tensor([segment.ids])
        if ids.shape[1] < 2:
            continue
        logits = peer(ids, use_cache=False).logits[0, :-1].double()
        losses = nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
        total = total + (losses * torch.tensor(segment.weights[1:], dtype=torch.float64)).sum()
    return total


def with_adapter(peer: nn.Module, folder: Path, *, seed: int = 1, **options: Any) -> peft.PeftModel:
    """A PEFT model whose factors are all random, saved to `folder`."""
    settings = {"r": 8, "lora_alpha": 12, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | options
    model = peft.get_peft_model(peer, peft.LoraConfig(**settings))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.1)
            elif "magnitude" in name:
                parameter.mul_(torch.rand_like(parameter) + 0.5)
    model.save_pretrained(folder)
    return model


@dataclass
class Ours:
    """The training pass over the files of a base and, where given, of an adapter."""

    decoder: Decoder
    training: TrainingPass
    adapter: TrainableAdapter | None
    parameters: Parameters

    def gradient(self, segments: list[Segment]) -> float:
        """Clears, runs one batch, leaves the gradients in place; returns the loss."""
        self.parameters.clear()
        sums = self.training.loss(batch(segments))
        sums.loss.backward()
        return float(sums.loss)


def load(
    folder: Path,
    adapter: Path | None = None,
    recompute: Recompute = Recompute.NONE,
    *,
    beside: tuple[str, ...] = (),
    **options: Any,
) -> Ours:
    """LoRA where there is an adapter, with slots trained beside it; all slots of the base otherwise."""
    decoder = load_model(resolve(str(folder)), dtype=torch.float32, device=CPU)
    if adapter is None:
        slots = {name: slot for name, slot in decoder.named_buffers() if name != "rotations"}
        parameters = Parameters(slots, Precision.FLOAT32)
        trained: dict[str, Trained] = {p.name: p.trained for p in parameters}
        return Ours(decoder, TrainingPass(decoder, trained=trained, recompute=recompute, **options), None, parameters)
    factors = read_adapter(adapter, decoder.config)
    slots = {name: decoder.get_buffer(name) for name in beside}
    trainable = TrainableAdapter(factors, decoder.config, precision=Precision.FLOAT32, device=CPU, beside=slots)
    trained = {name: trainable.parameters[name].trained for name in beside}
    training = TrainingPass(decoder, trained=trained, adapters=trainable.products, recompute=recompute, **options)
    return Ours(decoder, training, trainable, trainable.parameters)
