"""One job from its settings to what it publishes."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path

import msgspec
import torch
import torch.distributed as dist
from lmesh_kernels import platforms
from lmesh_kernels.layers.recompute import Recompute
from lmesh_kernels.lora.sites import sites
from lmesh_kernels.models.config import ModelConfig, UnsupportedModelError
from lmesh_kernels.models.decoder import Decoder
from lmesh_kernels.models.parameters import Precision
from lmesh_kernels.models.safetensors_folder import WeightsError
from lmesh_kernels.platforms.platform import Platform, PlatformError
from lmesh_kernels.text.digests import base_digest
from lmesh_kernels.text.resolve import ModelFiles, ModelNotFoundError, resolve
from lmesh_kernels.text.tokenizer import load_tokenizer
from safetensors import SafetensorError

from lmesh_trainer import events
from lmesh_trainer.base import check_sharding, load_base, quantisation_of, shards_of
from lmesh_trainer.data.errors import DatasetError
from lmesh_trainer.data.feed import Feed
from lmesh_trainer.data.opening import open_feed
from lmesh_trainer.errors import JobError, disk_full
from lmesh_trainer.learner import Learner
from lmesh_trainer.loop import Loop, Parts
from lmesh_trainer.manifest import make_manifest, start_digest
from lmesh_trainer.manifest_file import write_manifest
from lmesh_trainer.memory_plan import TrainingPlan, plan_training
from lmesh_trainer.messages import Wish
from lmesh_trainer.optimiser import AdamW, Optimiser
from lmesh_trainer.ranks import least
from lmesh_trainer.recorders import Recorded, check_recorders
from lmesh_trainer.spec import JobSpec
from lmesh_trainer.subject import Subject, make_subject, peft_config, start_adapter, whole_modules
from lmesh_trainer.vocabulary import added_tokens, trained_config

Report = Callable[[events.Event], None]


def never() -> Wish | None:
    """A job that nobody asks anything."""
    return None


def run_job(spec: JobSpec, folder: Path, report: Report, asked: Callable[[], Wish | None] = never) -> events.Ended:
    """Runs a job in its folder, going on from the newest checkpoint there; tells everything, `Ended` last.

    What a person can put right ends the job as FAILED with its reason; anything else is raised.
    """
    try:
        first = not _ranked() or dist.get_rank() == 0
        with closing(Recorded(report, spec.report_to if first else (), folder)) as recorded:
            ended = events.Ended(outcome=_run(spec, folder, recorded, asked))
    except (JobError, DatasetError, UnsupportedModelError, WeightsError) as error:
        ended = events.Ended(outcome=events.Outcome.FAILED, reason=error.reason, message=str(error))
    except (ModelNotFoundError, PlatformError) as error:
        reason = "MODEL_NOT_FOUND" if isinstance(error, ModelNotFoundError) else "DEVICE_UNAVAILABLE"
        ended = events.Ended(outcome=events.Outcome.FAILED, reason=reason, message=str(error))
    report(ended)
    return ended


def check_job(spec: JobSpec, report: Report) -> None:
    """A dry run: the dataset read and shown, and the memory planned; nothing is loaded or written.

    Raises what a run would end with.
    """
    check_recorders(spec.report_to)
    files = resolve(spec.model)
    platform = platforms.detect(spec.device, threads=spec.threads)
    config = trained_config(spec, files)
    feed = _feed(spec, files, config, report)
    _plan(spec, config, feed, platform, report)


def _run(spec: JobSpec, folder: Path, report: Report, asked: Callable[[], Wish | None]) -> events.Outcome:
    folder.mkdir(parents=True, exist_ok=True)
    files = resolve(spec.model)
    platform = platforms.detect(spec.device, threads=spec.threads)
    config = trained_config(spec, files)
    feed = _feed(spec, files, config, report)
    plan = _plan(spec, config, feed, platform, report)
    report(events.PhaseBegun(phase=events.Phase.LOADING_MODEL))
    precision = _precision(spec, platform)
    home = load_base(spec, files, config, platform=platform, precision=precision)
    subject = make_subject(spec, home, files, precision=precision, recompute=plan.recompute)
    loop = _loop(spec, folder, files, feed, subject, plan, platform, report, asked)
    loop.resume()
    report(events.PhaseBegun(phase=events.Phase.REHEARSING))
    loop.rehearse()
    report(events.PhaseBegun(phase=events.Phase.TRAINING))
    outcome = loop.run()
    if outcome is events.Outcome.COMPLETED:
        report(events.PhaseBegun(phase=events.Phase.FINALIZING))
        loop.take_best()
        wholes = subject.parameters.wholes()
        if not _ranked() or dist.get_rank() == 0:
            _publish(spec, folder, files, feed, subject, wholes, loop, report)
    return outcome


def _ranked() -> bool:
    return dist.is_available() and dist.is_initialized()


def _feed(spec: JobSpec, files: ModelFiles, config: ModelConfig, report: Report) -> Feed:
    report(events.PhaseBegun(phase=events.Phase.LOADING_DATASET))
    tokenizer = load_tokenizer(files, added_tokens(spec))
    feed = open_feed(spec, tokenizer, context=config.max_position_embeddings)
    report(feed.report(tokenizer))
    return feed


def _precision(spec: JobSpec, platform: Platform) -> Precision:
    if spec.precision != "auto":
        return Precision(spec.precision)
    return Precision.FLOAT32 if platform.default_dtype() == torch.float32 else Precision.BF16


def _plan(spec: JobSpec, config: ModelConfig, feed: Feed, platform: Platform, report: Report) -> TrainingPlan:
    precision = _precision(spec, platform)
    check_sharding(spec, precision)
    trained = _trained_count(spec, config)
    plan = plan_training(
        config,
        precision=precision,
        trained=trained,
        frozen=spec.method == "lora",
        longest=feed.longest,
        free=least(platform.memory_free()),  # all ranks make the same plan
        device_type=platform.device.type,
        micro_tokens=spec.micro_tokens,
        recompute=None if spec.recompute == "auto" else Recompute(spec.recompute),
        quantisation=quantisation_of(spec, config),
        shards=shards_of(spec),
        modules=_module_count(spec, config) if spec.method == "lora" else 0,
        dora=spec.method == "lora" and _is_dora(spec, config),
        dropout=spec.method == "lora" and spec.lora.lora_dropout > 0,
    )
    report(
        events.PlanMade(
            lines=plan.lines,
            free_bytes=plan.free,
            micro_tokens=plan.micro_tokens,
            recompute=plan.recompute.value,
            steps=feed.total_steps,
            trained_parameters=trained,
        )
    )
    return plan


def _trained_count(spec: JobSpec, config: ModelConfig) -> int:
    shapes = Decoder(config, dtype=torch.float32, device=torch.device("meta"))
    if spec.method == "full":
        return sum(slot.numel() for name, slot in shapes.named_buffers() if name != "rotations")
    modules = _module_count(spec, config)
    if spec.lora.start:
        adapter = start_adapter(spec, config)
        return modules + sum(
            f.a.numel() + f.b.numel() + (0 if f.magnitude is None else len(f.magnitude)) for f in adapter.values()
        )
    told = peft_config(spec.lora)
    wanted = {site: shape for site, shape in sites(config).items() if told.targets(site)}
    if not wanted:
        raise JobError("BAD_ADAPTER", f"NO_TARGETS: target_modules {spec.lora.target_modules!r} name no projection")
    extra = 1 if told.dora else 0
    return modules + sum(told.rank(site) * (s.inputs + s.outputs) + extra * s.outputs for site, s in wanted.items())


def _is_dora(spec: JobSpec, config: ModelConfig) -> bool:
    """Of an adapter to go on from, its own shape is taken."""
    if not spec.lora.start:
        return spec.lora.use_dora
    return any(factors.magnitude is not None for factors in start_adapter(spec, config).values())


def _module_count(spec: JobSpec, config: ModelConfig) -> int:
    return len(whole_modules(spec, config)) * config.vocab_size * config.hidden_size


def _loop(
    spec: JobSpec,
    folder: Path,
    files: ModelFiles,
    feed: Feed,
    subject: Subject,
    plan: TrainingPlan,
    platform: Platform,
    report: Report,
    asked: Callable[[], Wish | None],
) -> Loop:
    told = spec.optimiser
    settings = AdamW(
        betas=(told.adam_beta1, told.adam_beta2),
        eps=told.adam_epsilon,
        weight_decay=told.weight_decay,
        eight_bit=told.optim == "adamw_8bit",
    )
    optimiser = Optimiser(subject.parameters, settings)
    learner = Learner(
        subject.training,
        subject.parameters,
        optimiser,
        max_grad_norm=told.max_grad_norm or None,
        dropout=spec.lora.lora_dropout if spec.method == "lora" else 0.0,
        seed=spec.seed,
    )
    ranks = _ranked()
    return Loop(
        Parts(
            spec=spec,
            spec_digest=_spec_digest(spec, files, feed, _precision(spec, platform)),
            feed=feed,
            learner=learner,
            parameters=subject.parameters,
            optimiser=optimiser,
            micro_tokens=plan.micro_tokens,
            folder=folder,
            device=platform.device,
            report=report,
            asked=asked,
            peak_bytes=platform.peak_bytes,
            rank=dist.get_rank() if ranks else 0,
            world=dist.get_world_size() if ranks else 1,
        )
    )


def _spec_digest(spec: JobSpec, files: ModelFiles, feed: Feed, precision: Precision) -> str:
    """Of what a job must share with its checkpoints: the settings that shape its steps, the model, the rows."""
    # Another trainer may hold the same files elsewhere: what they hold counts, not where they lie.
    places = {
        "model": "",
        "dataset": msgspec.structs.replace(spec.dataset, source=""),
        "lora": msgspec.structs.replace(spec.lora, start=start_digest(spec)),
    }
    ranked = {"parallelism": "ddp", "nodes": 1, "world": 1, "threads": 0, "device": "auto"}
    kept = {"keep_checkpoints": 1, "save_steps": 0, "report_to": (), "precision": precision.value}
    same = msgspec.structs.replace(spec, **kept, **ranked, **places)
    digest = hashlib.sha256(msgspec.json.encode(same, order="sorted"))
    digest.update(base_digest(files, nf4=spec.load_in_4bit).encode())
    digest.update(feed.identity().encode())
    return digest.hexdigest()


def _publish(
    spec: JobSpec,
    folder: Path,
    files: ModelFiles,
    feed: Feed,
    subject: Subject,
    wholes: Mapping[str, torch.Tensor],
    loop: Loop,
    report: Report,
) -> None:
    target = folder / ("adapter" if spec.makes_adapter else "model")
    if target.exists():  # of an attempt that died after this point
        shutil.rmtree(target)
    try:
        digest = subject.publish(target, wholes)
        write_manifest(target, make_manifest(spec, files, feed, loop.progress, digest=digest))
    except (OSError, SafetensorError) as error:
        raise JobError("DISK_FULL" if disk_full(error) else "PUBLISH_FAILED", f"{target.name}: {error}") from error
    report(events.Published(folder=str(target), digest=digest))
