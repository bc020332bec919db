"""The model that a job trains or adapts, where its ranks hold it: each one whole, or all of them in parts."""

from __future__ import annotations

import logging

from lmesh_kernels.models.config import ModelConfig, Quantisation
from lmesh_kernels.models.home import Home, ResidentHome
from lmesh_kernels.models.parameters import Parameters, Precision, ranks
from lmesh_kernels.models.registry import load_model, load_sharded
from lmesh_kernels.platforms.platform import Platform
from lmesh_kernels.text.resolve import ModelFiles

from lmesh_trainer.errors import JobError
from lmesh_trainer.spec import JobSpec
from lmesh_trainer.vocabulary import growth

_log = logging.getLogger(__name__)


def quantisation_of(spec: JobSpec, config: ModelConfig) -> Quantisation:
    """How the base's products are held. Raises JobError NOT_SUPPORTED."""
    if config.quantisation != "none" and spec.method == "full":
        hint = "the base is quantised: its weights cannot be trained; take method lora"
        raise JobError("NOT_SUPPORTED", hint)
    if config.quantisation != "none" and spec.parallelism == "fsdp":
        raise JobError(
            "NOT_SUPPORTED", "parallelism fsdp: the base is quantised, and stays whole on every rank; take ddp"
        )
    return "nf4" if spec.load_in_4bit else config.quantisation


def check_sharding(spec: JobSpec, precision: Precision) -> None:
    """Raises JobError NOT_SUPPORTED for what cannot be sharded."""
    if spec.parallelism != "fsdp":
        return
    if spec.modules_to_save:
        hint = "parallelism fsdp: modules_to_save and added tokens are trained whole, beside a base in parts; take ddp"
        raise JobError("NOT_SUPPORTED", hint)
    if spec.method != "full":
        return
    if precision is Precision.BF16_PURE:
        raise JobError(
            "NOT_SUPPORTED", "parallelism fsdp, method full: precision bf16-pure has no float32 sums; take bf16"
        )
    if spec.optimiser.optim == "adamw_8bit":
        hint = "parallelism fsdp, method full: optim adamw_8bit keeps its state in blocks across rows; take adamw"
        raise JobError("NOT_SUPPORTED", hint)


def shards_of(spec: JobSpec) -> int:
    """Parts that the model is held in, one a rank; a dry run is told how many those will be."""
    return max(ranks(), spec.world) if spec.parallelism == "fsdp" else 1


def load_base(
    spec: JobSpec, files: ModelFiles, config: ModelConfig, *, platform: Platform, precision: Precision
) -> Home:
    """Loads the model; every rank calls it. Raises WeightsError."""
    trained = spec.method == "full"
    if spec.parallelism == "fsdp" and ranks() > 1:
        return load_sharded(files, precision=precision, device=platform.device, trained=trained)
    if spec.parallelism == "fsdp":
        _log.warning("parallelism fsdp on one process: the model is whole on it")
    quantisation = quantisation_of(spec, config)
    decoder = load_model(
        files,
        dtype=precision.dtype,
        device=platform.device,
        quantisation=quantisation,
        growth=growth(spec, files),
        platform=platform,
    )
    return ResidentHome(decoder)


def base_parameters(home: Home, precision: Precision) -> tuple[Home, Parameters]:
    """The model's own weights as what is trained, and where a pass then finds them."""
    if not isinstance(home, ResidentHome):
        from lmesh_kernels.models.sharded import ShardedHome, ShardedParameters

        assert isinstance(home, ShardedHome)
        return home, ShardedParameters(home)
    slots = {name: slot for name, slot in home.decoder.named_buffers() if name != "rotations"}
    parameters = Parameters(slots, precision)
    return ResidentHome(home.decoder, {parameter.name: parameter.trained for parameter in parameters}), parameters
