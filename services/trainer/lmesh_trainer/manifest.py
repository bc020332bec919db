"""What a published folder was made of and how to use it, for its manifest."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec
from lmesh_kernels.text.digests import base_digest, file_digest, is_quantised, text_digest
from lmesh_kernels.text.generation import load_generation_defaults
from lmesh_kernels.text.resolve import ModelFiles

from lmesh_trainer.checkpoint import Progress
from lmesh_trainer.data.feed import Feed
from lmesh_trainer.manifest_file import Manifest
from lmesh_trainer.spec import JobSpec

_FORMAT = "lmesh-manifest-v1"
_GENERATION_FILE = "generation_config.json"


def start_digest(spec: JobSpec) -> str:
    """sha256 of the weights file of the adapter that training begins with; empty where it begins anew."""
    weights = Path(spec.lora.start) / "adapter_model.safetensors"
    return file_digest(weights) if spec.lora.start and weights.is_file() else ""


def make_manifest(spec: JobSpec, files: ModelFiles, feed: Feed, progress: Progress, *, digest: str) -> Manifest:
    """The manifest of what a job publishes; `digest` is the content digest of its tensors.

    The same job gives the same manifest: it holds no times, and no places but the base's source.
    """
    nf4 = spec.load_in_4bit or is_quantised(files)
    taken = progress.best_step if spec.early_stop_patience and progress.best_step else progress.step
    return {
        "format": _FORMAT,
        "lmesh_version": _version(),
        "method": spec.method,
        "digest": digest,
        "base": {
            "model": spec.model,
            "source": files.source,
            "digest": base_digest(files, nf4=spec.load_in_4bit),
            "quantisation": "nf4" if nf4 else "none",
            "text_digest": text_digest(files),
        },
        "job": _recipe(spec),
        **feed.summary(),
        "recommended_sampling": _recommended(files),
        "steps": taken,
        "trained_tokens": progress.trained_tokens,
        "final_loss": progress.last_loss,
        "best_eval_loss": progress.best_eval_loss,
    }


def _recipe(spec: JobSpec) -> Manifest:
    """The settings without where and with what they were run; files by name and digest, not by place."""
    told: Manifest = msgspec.to_builtins(spec)
    for place in ("model", "device", "threads", "world", "nodes", "parallelism", "report_to", "keep_checkpoints"):
        del told[place]
    if not spec.dataset.source.startswith("hub:"):
        told["dataset"]["source"] = Path(spec.dataset.source).name
    told["lora"]["start"] = start_digest(spec)
    if spec.method == "full":
        del told["lora"]
    return told


def _recommended(files: ModelFiles) -> dict[str, Manifest]:
    """What the base's authors recommend for sampling, each with where that is said; what nobody says is left out."""
    found = load_generation_defaults(files)
    path = files.path / _GENERATION_FILE
    said = json.loads(path.read_text(encoding="utf-8")) if files.format == "hf" and path.is_file() else {}
    if said.get("do_sample") is False:
        said["temperature"] = 0.0
    values = {name: getattr(found, name) for name in ("temperature", "top_p", "top_k", "max_new_tokens")}
    return {
        name: {"value": value, "source": f"{_GENERATION_FILE} of the base" if name in said else "lmesh's catalog"}
        for name, value in values.items()
        if value is not None
    }


def _version() -> str:
    try:
        return version("lmesh-trainer")
    except PackageNotFoundError:  # run from a source tree
        return "unknown"
