"""What a job trains, as one thing: the model's pass, its parameters, and how they are published."""

from __future__ import annotations

import shutil
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
from lmesh_kernels.models.home import Home
from lmesh_kernels.models.parameters import Parameters, Precision
from lmesh_kernels.models.training import TrainingPass
from lmesh_kernels.models.weights import bindings
from lmesh_kernels.text.digests import file_digest
from lmesh_kernels.text.resolve import ModelFiles
from safetensors.torch import save_file
from torch import Tensor

from lmesh_trainer.base import base_parameters
from lmesh_trainer.errors import JobError
from lmesh_trainer.spec import JobSpec, LoraSpec


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
    """Every rank calls it. Raises JobError BAD_ADAPTER or NOT_SUPPORTED."""
    if spec.method == "full":
        return _full(home, files, precision, recompute)
    return _lora(spec, home, precision, recompute)


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


def _lora(spec: JobSpec, home: Home, precision: Precision, recompute: Recompute) -> Subject:
    # Adapters are small: every rank holds them whole, and their gradients are summed once an update.
    config = home.decoder.config
    adapter = TrainableAdapter(start_adapter(spec, config, home), config, precision=precision, device=home.device)

    def publish(folder: Path, wholes: Mapping[str, Tensor]) -> str:
        found = adapter.adapter()
        write_adapter(folder, found, base=spec.model)
        return content_digest(found)

    training = TrainingPass(home, adapters=adapter.products, recompute=recompute)
    return Subject(parameters=adapter.parameters, training=training, publish=publish)


def _full(home: Home, files: ModelFiles, precision: Precision, recompute: Recompute) -> Subject:
    if files.format == "gguf":
        hint = "full fine-tuning of a GGUF file cannot be published yet: take a model in safetensors, or method lora"
        raise JobError("NOT_SUPPORTED", hint)
    config = home.decoder.config
    home, parameters = base_parameters(home, precision)
    training = TrainingPass(home, recompute=recompute)

    def publish(folder: Path, wholes: Mapping[str, Tensor]) -> str:
        return _write_model(folder, config, wholes, files, precision)

    return Subject(parameters=parameters, training=training, publish=publish)


def _write_model(
    folder: Path, config: ModelConfig, wholes: Mapping[str, Tensor], files: ModelFiles, precision: Precision
) -> str:
    """A model folder as the base's, with the trained weights in the dtype of the pass."""
    draft = folder.with_name(f".{folder.name}-draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    tensors = {
        name: wholes[place.slot][place.start : place.start + place.rows]
        .detach()
        .to("cpu", precision.dtype)
        .contiguous()
        for name, place in bindings(config).items()
        if not place.duplicate and place.slot in wholes
    }
    save_file(tensors, draft / "model.safetensors", metadata={"format": "pt"})
    for path in files.path.iterdir():
        if path.is_file() and path.suffix in (".json", ".jinja", ".txt", ".model") and ".index." not in path.name:
            shutil.copyfile(path, draft / path.name)
    draft.replace(folder)
    return file_digest(folder / "model.safetensors")
