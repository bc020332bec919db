"""What a job trains, as one thing: the model's pass, its parameters, and how they are published."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lmesh_kernels.layers.recompute import Recompute
from lmesh_kernels.lora.factors import Adapter, content_digest
from lmesh_kernels.lora.initial import initial_adapter
from lmesh_kernels.lora.peft_config import AdapterFilesError, PeftConfig
from lmesh_kernels.lora.peft_files import read_adapter, write_adapter
from lmesh_kernels.lora.sites import Site, sites
from lmesh_kernels.lora.trainable import TrainableAdapter
from lmesh_kernels.models.config import ModelConfig
from lmesh_kernels.models.home import Home, ResidentHome
from lmesh_kernels.models.parameters import Parameters, Precision
from lmesh_kernels.models.training import TrainingPass
from lmesh_kernels.text.added_tokens import AddedTokens
from lmesh_kernels.text.resolve import ModelFiles
from torch import Tensor

from lmesh_trainer.base import base_parameters
from lmesh_trainer.errors import JobError
from lmesh_trainer.export.merged import write_model
from lmesh_trainer.export.tensors import live_tensors, slot_tensors
from lmesh_trainer.spec import JobSpec, LoraSpec
from lmesh_trainer.vocabulary import added_tokens

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Subject:
    """The trained thing. `publish` writes it to a new folder and returns its content digest; it is given what
    `parameters.wholes()` gave the first rank.
    """

    parameters: Parameters
    training: TrainingPass
    publish: Callable[[Path, Mapping[str, Tensor]], str]


def peft_config(spec: LoraSpec) -> PeftConfig:
    """The adapter's shape as the adapter files tell it."""
    return PeftConfig(
        r=spec.r,
        alpha=spec.lora_alpha,
        target_modules=spec.target_modules,
        exclude_modules=spec.exclude_modules,
        layers=None if spec.layers_to_transform is None else frozenset(spec.layers_to_transform),
        rank_pattern=spec.rank_pattern,
        alpha_pattern=spec.alpha_pattern,
        rslora=spec.use_rslora,
        dora=spec.use_dora,
    )


def make_subject(
    spec: JobSpec, home: Home, files: ModelFiles, *, precision: Precision, recompute: Recompute
) -> Subject:
    """`home` has the vocabulary that is trained; every rank calls it. Raises JobError BAD_ADAPTER."""
    if spec.method == "full":
        return _full(home, files, added_tokens(spec), precision, recompute)
    return _lora(spec, home, files, precision, recompute)


def whole_modules(spec: JobSpec, config: ModelConfig) -> tuple[str, ...]:
    """Slots of the decoder that are trained beside an adapter. Of a tied model both names mean the one matrix."""
    head = "embedding.weight" if config.tie_word_embeddings else "head.weight"
    slots = {"embed_tokens": "embedding.weight", "lm_head": head}
    return tuple(sorted({slots[name] for name in spec.modules_to_save}))


def start_adapter(spec: JobSpec, model: ModelConfig, home: Home | None = None) -> Adapter:
    """The adapter that training begins with; `home` has the weights that a new one needs, of DoRA. Every rank calls
    it. Raises JobError BAD_ADAPTER.
    """
    try:
        if spec.lora.start:
            return read_adapter(Path(spec.lora.start), model)
        rows = None if home is None else partial(_rows, home)
        return initial_adapter(peft_config(spec.lora), model, seed=spec.seed, weight=rows)
    except AdapterFilesError as error:
        raise JobError("BAD_ADAPTER", f"{error.reason}: {error}") from error


def _rows(home: Home, site: Site) -> Tensor:
    shape = sites(home.decoder.config)[site]
    return home.matrix(shape.slot)[shape.start : shape.start + shape.outputs]


def _lora(spec: JobSpec, home: Home, files: ModelFiles, precision: Precision, recompute: Recompute) -> Subject:
    # Adapters are small: every rank holds them whole, and their gradients are summed once an update.
    decoder, config = home.decoder, home.decoder.config
    modules = {slot: decoder.get_buffer(slot) for slot in whole_modules(spec, config)}
    begun = start_adapter(spec, config, home)
    adapter = TrainableAdapter(begun, config, precision=precision, device=home.device, beside=modules)

    def publish(folder: Path, wholes: Mapping[str, Tensor]) -> str:
        found = adapter.adapter()
        if modules:
            tensors = live_tensors(decoder, found)
            told = added_tokens(spec)
            return write_model(folder, tensors, config=config, dtype=decoder.dtype, files=files, added=told)
        write_adapter(folder, found, base=spec.model)
        return content_digest(found)

    if modules:
        home = ResidentHome(decoder, {slot: adapter.parameters[slot].trained for slot in modules})
    if any(factors.magnitude is not None for factors in begun.values()):
        _log.info("DoRA: products with magnitudes are computed unfused, which is right and slower")
    training = TrainingPass(home, adapters=adapter.products, recompute=recompute)
    return Subject(parameters=adapter.parameters, training=training, publish=publish)


def _full(home: Home, files: ModelFiles, added: AddedTokens, precision: Precision, recompute: Recompute) -> Subject:
    config = home.decoder.config
    home, parameters = base_parameters(home, precision)
    training = TrainingPass(home, recompute=recompute)

    def publish(folder: Path, wholes: Mapping[str, Tensor]) -> str:
        tensors = slot_tensors(config, wholes, precision.dtype)
        return write_model(folder, tensors, config=config, dtype=precision.dtype, files=files, added=added)

    return Subject(parameters=parameters, training=training, publish=publish)
