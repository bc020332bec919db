"""What a job trains, as one thing: the model's pass, its parameters, and how they are published."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lmesh_kernels.layers.recompute import Recompute
from lmesh_kernels.lora.factors import Adapter, content_digest
from lmesh_kernels.lora.initial import initial_adapter
from lmesh_kernels.lora.peft_config import AdapterFilesError, PeftConfig
from lmesh_kernels.lora.peft_files import read_adapter, write_adapter
from lmesh_kernels.lora.sites import Site, sites
from lmesh_kernels.lora.trainable import TrainableAdapter
from lmesh_kernels.models.config import ModelConfig
from lmesh_kernels.models.decoder import Decoder
from lmesh_kernels.models.parameters import Parameters, Precision
from lmesh_kernels.models.training import TrainingPass
from lmesh_kernels.text.added_tokens import AddedTokens
from lmesh_kernels.text.resolve import ModelFiles
from torch import Tensor

from lmesh_trainer.errors import JobError
from lmesh_trainer.export.merged import write_model
from lmesh_trainer.spec import JobSpec, LoraSpec
from lmesh_trainer.vocabulary import added_tokens


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Subject:
    """The trained thing. `publish` writes it to a new folder and returns its content digest."""

    parameters: Parameters
    training: TrainingPass
    publish: Callable[[Path], str]


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
    spec: JobSpec, decoder: Decoder, files: ModelFiles, *, precision: Precision, recompute: Recompute
) -> Subject:
    """`decoder` has the vocabulary that is trained. Raises JobError BAD_ADAPTER."""
    if spec.method == "full":
        return _full(decoder, files, added_tokens(spec), precision, recompute)
    return _lora(spec, decoder, files, precision, recompute)


def whole_modules(spec: JobSpec, config: ModelConfig) -> tuple[str, ...]:
    """Slots of the decoder that are trained beside an adapter. Of a tied model both names mean the one matrix."""
    head = "embedding.weight" if config.tie_word_embeddings else "head.weight"
    slots = {"embed_tokens": "embedding.weight", "lm_head": head}
    return tuple(sorted({slots[name] for name in spec.modules_to_save}))


def start_adapter(spec: JobSpec, decoder: Decoder) -> Adapter:
    """The adapter that training begins with. Raises JobError BAD_ADAPTER."""
    try:
        if spec.lora.start:
            return read_adapter(Path(spec.lora.start), decoder.config)
        config = peft_config(spec.lora)
        return initial_adapter(config, decoder.config, seed=spec.seed, weight=lambda site: _rows(decoder, site))
    except AdapterFilesError as error:
        raise JobError("BAD_ADAPTER", f"{error.reason}: {error}") from error


def _rows(decoder: Decoder, site: Site) -> Tensor:
    shape = sites(decoder.config)[site]
    return decoder.product(shape.slot).matrix()[shape.start : shape.start + shape.outputs]


def _lora(spec: JobSpec, decoder: Decoder, files: ModelFiles, precision: Precision, recompute: Recompute) -> Subject:
    modules = {slot: decoder.get_buffer(slot) for slot in whole_modules(spec, decoder.config)}
    adapter = TrainableAdapter(
        start_adapter(spec, decoder), decoder.config, precision=precision, device=decoder.arena.device, beside=modules
    )

    def publish(folder: Path) -> str:
        found = adapter.adapter()
        if modules:
            return write_model(folder, decoder, found, files=files, added=added_tokens(spec))
        write_adapter(folder, found, base=spec.model)
        return content_digest(found)

    trained = {slot: adapter.parameters[slot].trained for slot in modules}
    training = TrainingPass(decoder, trained=trained, adapters=adapter.products, recompute=recompute)
    return Subject(parameters=adapter.parameters, training=training, publish=publish)


def _full(
    decoder: Decoder, files: ModelFiles, added: AddedTokens, precision: Precision, recompute: Recompute
) -> Subject:
    slots = {name: slot for name, slot in decoder.named_buffers() if name != "rotations"}
    parameters = Parameters(slots, precision)
    trained = {parameter.name: parameter.trained for parameter in parameters}
    training = TrainingPass(decoder, trained=trained, recompute=recompute)
    return Subject(
        parameters=parameters,
        training=training,
        publish=lambda folder: write_model(folder, decoder, {}, files=files, added=added),
    )
