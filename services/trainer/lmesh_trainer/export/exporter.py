"""Exports: written beside their place, read back, compared on fixed prompts with what they were made of, then moved."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path

import torch
from lmesh_kernels.layers.packed_batch import PackedBatch, Segment, pack_batch
from lmesh_kernels.lora.factors import Adapter
from lmesh_kernels.lora.trainable import TrainableAdapter
from lmesh_kernels.models.config import Quantisation, load_config
from lmesh_kernels.models.parameters import Precision
from lmesh_kernels.models.registry import load_model
from lmesh_kernels.models.training import TrainingPass
from lmesh_kernels.text.resolve import ModelFiles, local_files
from torch import Tensor

from lmesh_trainer.errors import JobError
from lmesh_trainer.export.gguf_file import GgufKind, read_back, write_gguf
from lmesh_trainer.export.merged import write_folder
from lmesh_trainer.export.tensors import Survival, merged_tensors

_CPU = torch.device("cpu")
_PROMPTS, _PROMPT_TOKENS = 4, 32


class ExportKind(StrEnum):
    """What is written."""

    FLOAT32 = "merged-float32"
    BF16 = "merged-bf16"
    F16 = "merged-f16"
    GGUF_F16 = "gguf-f16"
    GGUF_Q8_0 = "gguf-q8_0"


_DTYPES = {ExportKind.FLOAT32: torch.float32, ExportKind.BF16: torch.bfloat16, ExportKind.F16: torch.float16}
# Most that a token's log-probability may be off in the mean, in nats: what rounding to the format does to a model
# whose own logits are of the order of ten, several times over.
_BOUNDS = {
    ExportKind.FLOAT32: 1e-4,
    ExportKind.F16: 0.02,
    ExportKind.BF16: 0.15,
    ExportKind.GGUF_F16: 0.02,
    ExportKind.GGUF_Q8_0: 0.15,
}
_LEAST_SURVIVAL = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """What was written and how near it is."""

    path: Path
    survival: float  # of the adapter's change, see `Survival`
    mean_difference: float  # of log-probabilities, nats
    max_difference: float


def export(
    files: ModelFiles, adapter: Adapter, target: Path, kind: ExportKind, *, nf4: bool = False, allow_loss: bool = False
) -> Exported:
    """Writes the model with the adapter merged in to `target`, a new folder or, for GGUF, a new file.

    `nf4`: the adapter was trained on the base in NF4, and is merged into what that makes of the weights.

    Raises JobError EXPORT_EXISTS, EXPORT_LOSSY (the format drops more than half of the adapter's change, unless
    `allow_loss`), EXPORT_DIFFERS (what is read back is another model), or what the format refuses: nothing is left.
    """
    if target.exists():
        raise JobError("EXPORT_EXISTS", f"{target} exists")
    target.parent.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        draft = place / target.name
        survival = _write(files, adapter, draft, kind, nf4)
        if survival.ratio < _LEAST_SURVIVAL and not allow_loss:
            said = f"{kind} keeps {survival.ratio:.0%} of what the adapter changes: take merged-float32 or the adapter"
            raise JobError("EXPORT_LOSSY", said)
        mean, worst = _differences(files, adapter, draft, nf4)
        if not mean <= _BOUNDS[kind]:
            said = f"log-probabilities differ by {mean:.3g} nats in the mean, {_BOUNDS[kind]:g} are allowed for {kind}"
            raise JobError("EXPORT_DIFFERS", said)
        draft.replace(target)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return Exported(path=target, survival=survival.ratio, mean_difference=mean, max_difference=worst)


def _write(files: ModelFiles, adapter: Adapter, draft: Path, kind: ExportKind, nf4: bool) -> Survival:
    config, survival = load_config(files), Survival()
    if kind in _DTYPES:
        dtype = _DTYPES[kind]
        draft.mkdir()
        tensors = merged_tensors(files, config, adapter, dtype, survival, lambda tensor: tensor.to(dtype), nf4=nf4)
        write_folder(draft, tensors, files=files, config=config, dtype=dtype)
        return survival
    gguf = GgufKind.F16 if kind is ExportKind.GGUF_F16 else GgufKind.Q8_0
    stored = partial(read_back, kind=gguf)
    exact = merged_tensors(files, config, adapter, torch.float32, survival, stored, nf4=nf4)
    write_gguf(draft, exact, files=files, config=config, kind=gguf)
    return survival


def _differences(files: ModelFiles, adapter: Adapter, draft: Path, nf4: bool) -> tuple[float, float]:
    """(mean, largest) difference of log-probabilities between base with adapter and what was written, in float32."""
    config = load_config(files)
    generator = torch.Generator().manual_seed(0)
    length = min(_PROMPT_TOKENS, config.max_position_embeddings)
    prompts = torch.randint(config.vocab_size, (_PROMPTS, length), generator=generator).tolist()
    batch = pack_batch([Segment(row=i, ids=ids, weights=[1.0] * length) for i, ids in enumerate(prompts)], _CPU)
    wanted = _logprobs(files, adapter, batch, "nf4" if nf4 else None)
    found = _logprobs(local_files(draft), {}, batch, None)
    distance = (wanted - found).abs()[batch.weights > 0]
    return float(distance.mean()), float(distance.max())


def _logprobs(files: ModelFiles, adapter: Adapter, batch: PackedBatch, quantisation: Quantisation | None) -> Tensor:
    decoder = load_model(files, dtype=torch.float32, device=_CPU, quantisation=quantisation)
    if not adapter:
        return TrainingPass(decoder).logprobs(batch)
    own = TrainableAdapter(adapter, decoder.config, precision=Precision.FLOAT32, device=_CPU)
    return TrainingPass(decoder, adapters=own.products).logprobs(batch)
