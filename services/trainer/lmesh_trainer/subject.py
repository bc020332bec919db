"""What a job trains, as one thing: the model's pass, its parameters, and how they are published."""

from __future__ import annotations

import shutil
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
from lmesh_kernels.models.decoder import Decoder
from lmesh_kernels.models.parameters import Parameters, Precision
from lmesh_kernels.models.training import TrainingPass
from lmesh_kernels.models.weights import bindings
from lmesh_kernels.text.digests import file_digest
from lmesh_kernels.text.resolve import ModelFiles
from safetensors.torch import save_file
from torch import Tensor

from lmesh_trainer.errors import JobError
from lmesh_trainer.spec import JobSpec, LoraSpec


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
    """Raises JobError BAD_ADAPTER or NOT_SUPPORTED."""
    if spec.method == "full":
        return _full(spec, decoder, files, precision, recompute)
    return _lora(spec, decoder, precision, recompute)


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


def _lora(spec: JobSpec, decoder: Decoder, precision: Precision, recompute: Recompute) -> Subject:
    adapter = TrainableAdapter(
        start_adapter(spec, decoder), decoder.config, precision=precision, device=decoder.arena.device
    )

    def publish(folder: Path) -> str:
        found = adapter.adapter()
        write_adapter(folder, found, base=spec.model)
        return content_digest(found)

    training = TrainingPass(decoder, adapters=adapter.products, recompute=recompute)
    return Subject(parameters=adapter.parameters, training=training, publish=publish)


def _full(spec: JobSpec, decoder: Decoder, files: ModelFiles, precision: Precision, recompute: Recompute) -> Subject:
    if files.format == "gguf":
        hint = "full fine-tuning of a GGUF file cannot be published yet: take a model in safetensors, or method lora"
        raise JobError("NOT_SUPPORTED", hint)
    slots = {name: slot for name, slot in decoder.named_buffers() if name != "rotations"}
    parameters = Parameters(slots, precision)
    trained = {parameter.name: parameter.trained for parameter in parameters}
    training = TrainingPass(decoder, trained=trained, recompute=recompute)
    return Subject(
        parameters=parameters,
        training=training,
        publish=lambda folder: _write_model(folder, decoder, parameters, files),
    )


def _write_model(folder: Path, decoder: Decoder, parameters: Parameters, files: ModelFiles) -> str:
    """A model folder as the base's, with the trained weights in the dtype of the pass."""
    draft = folder.with_name(f".{folder.name}-draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    tensors = {
        name: parameters[place.slot].trained.value[place.start : place.start + place.rows].detach().cpu().contiguous()
        for name, place in bindings(decoder.config).items()
        if not place.duplicate and place.slot in parameters
    }
    save_file(tensors, draft / "model.safetensors", metadata={"format": "pt"})
    for path in files.path.iterdir():
        if path.is_file() and path.suffix in (".json", ".jinja", ".txt", ".model") and ".index." not in path.name:
            shutil.copyfile(path, draft / path.name)
    draft.replace(folder)
    return file_digest(folder / "model.safetensors")
