"""Adapters on disk in PEFT's layout: every tensor binds to a site and every site is whole, or reading fails by name."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lmesh_kernels.lora.factors import Adapter, Factors
from lmesh_kernels.lora.peft_config import CONFIG_FILE, AdapterFilesError, PeftConfig, read_config
from lmesh_kernels.lora.sites import Site, SiteShape, sites
from lmesh_kernels.models.config import ModelConfig

WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_LEAVES = {
    "lora_A.weight": "a",
    "lora_B.weight": "b",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",  # before PEFT 0.14
}


def read_adapter(folder: Path, model: ModelConfig) -> dict[Site, Factors]:
    """The adapter in a folder, for a model of that config; tensors as they are stored, on the CPU.

    Raises AdapterFilesError: what `read_config` raises, NO_WEIGHTS, UNKNOWN_TENSORS, MISSING_TENSORS, DUPLICATE_TENSOR,
    SHAPE_MISMATCH, NOT_FINITE.
    """
    config, known = read_config(folder), sites(model)
    parts = _parts(folder, known)
    wanted = {site for site in known if config.targets(site)}
    if not wanted:
        raise AdapterFilesError("MISSING_TENSORS", f"{CONFIG_FILE}: target_modules name no projection of this model")
    strange = sorted(site.theirs for site in parts.keys() - wanted)
    if strange:
        raise AdapterFilesError(
            "UNKNOWN_TENSORS", f"tensors of modules that {CONFIG_FILE} does not target: {strange[:8]}"
        )
    return {site: _factors(site, known[site], parts.get(site, {}), config) for site in sorted(wanted)}


def _parts(folder: Path, known: dict[Site, SiteShape]) -> dict[Site, dict[str, Tensor]]:
    names = {site.theirs: site for site in known}
    parts: dict[Site, dict[str, Tensor]] = {}
    unknown: list[str] = []
    for name, tensor in _tensors(folder / WEIGHTS_FILE).items():
        module, leaf = _split(name.removeprefix(_PREFIX))
        if module not in names or leaf is None:
            unknown.append(name)
        elif leaf in (held := parts.setdefault(names[module], {})):
            raise AdapterFilesError("DUPLICATE_TENSOR", f"{name} is there twice")
        else:
            held[leaf] = tensor
    if unknown:
        raise AdapterFilesError("UNKNOWN_TENSORS", f"tensors without a place in this model: {sorted(unknown)[:8]}")
    return parts


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError) as error:
        raise AdapterFilesError("NO_WEIGHTS", f"{path} cannot be read: {error}") from error


def _split(name: str) -> tuple[str, str | None]:
    for ending, leaf in _LEAVES.items():
        if name.endswith(f".{ending}"):
            return name.removesuffix(f".{ending}"), leaf
    return name, None


def _factors(site: Site, shape: SiteShape, parts: dict[str, Tensor], config: PeftConfig) -> Factors:
    rank = config.rank(site)
    due: dict[str, tuple[int, ...]] = {"a": (rank, shape.inputs), "b": (shape.outputs, rank)}
    if config.dora:
        due["magnitude"] = (shape.outputs,)
    if missing := sorted(due.keys() - parts.keys()):
        raise AdapterFilesError("MISSING_TENSORS", f"{site.theirs} lacks {', '.join(missing)}")
    if strange := sorted(parts.keys() - due.keys()):
        raise AdapterFilesError("UNKNOWN_TENSORS", f"{site.theirs} has {', '.join(strange)}, and use_dora is not set")
    for leaf, tensor in parts.items():
        if tuple(tensor.shape) != due[leaf]:
            shapes = f"{tuple(tensor.shape)}, not {due[leaf]}"
            raise AdapterFilesError("SHAPE_MISMATCH", f"{site.theirs}: {leaf} has shape {shapes}, rank and model say")
        if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            raise AdapterFilesError("NOT_FINITE", f"{site.theirs}: {leaf} holds values that are no finite numbers")
    return Factors(a=parts["a"], b=parts["b"], scale=config.scale(site), magnitude=parts.get("magnitude"))


def write_adapter(folder: Path, adapter: Adapter, *, base: str) -> None:
    """Writes a new folder in PEFT's layout, whole or not at all; `base` is the model's name, a note.

    ValueError when only some of the sites have a magnitude, or there is none; FileExistsError.
    """
    if not adapter or len({factors.magnitude is None for factors in adapter.values()}) != 1:
        raise ValueError("an adapter has sites, and a magnitude at all of them or at none")
    if folder.exists():
        raise FileExistsError(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        save_file(_named_tensors(adapter), draft / WEIGHTS_FILE, metadata={"format": "pt"})
        (draft / CONFIG_FILE).write_text(json.dumps(_told(adapter, base), indent=2, sort_keys=True) + "\n")
        draft.chmod(0o755)  # a temporary folder is its maker's alone, and workers run as others
        draft.replace(folder)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def _named_tensors(adapter: Adapter) -> dict[str, Tensor]:
    named: dict[str, Tensor] = {}
    for site, factors in adapter.items():
        module = f"{_PREFIX}{site.theirs}"
        named[f"{module}.lora_A.weight"] = factors.a.detach().contiguous()
        named[f"{module}.lora_B.weight"] = factors.b.detach().contiguous()
        if factors.magnitude is not None:
            named[f"{module}.lora_magnitude_vector"] = factors.magnitude.detach().contiguous()
    return named


def _told(adapter: Adapter, base: str) -> dict[str, Any]:
    """Ranks and alphas that differ from the most common ones go into patterns, by whole names."""
    ranks = {site.theirs: factors.rank for site, factors in adapter.items()}
    alphas = {site.theirs: factors.scale * factors.rank for site, factors in adapter.items()}
    (rank, _), (alpha, _) = Counter(ranks.values()).most_common(1)[0], Counter(alphas.values()).most_common(1)[0]
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "bias": "none",
        "lora_dropout": 0.0,
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(ranks),
        "rank_pattern": {name: found for name, found in sorted(ranks.items()) if found != rank},
        "alpha_pattern": {name: found for name, found in sorted(alphas.items()) if found != alpha},
        "use_rslora": False,
        "use_dora": any(factors.magnitude is not None for factors in adapter.values()),
    }
