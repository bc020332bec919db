"""adapter_config.json as PEFT writes it: what of it this project computes, and what it refuses by name."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import regex

from lmesh_kernels.lora.sites import Site

Number = TypeVar("Number", int, float)

CONFIG_FILE = "adapter_config.json"
_MATCH_S, _LONGEST_PATTERN = 0.2, 1024
# Read, or without a meaning once the adapter is trained. Whatever else is set is refused.
_READ = {"peft_type", "r", "lora_alpha", "target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"}
_READ |= {"layers_to_transform", "layers_pattern", "use_rslora", "use_dora", "bias", "init_lora_weights"}
_NOTES = {"auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "task_type", "peft_version"}
_NOTES |= {"lora_dropout", "loftq_config", "corda_config", "eva_config", "lora_ga_config", "runtime_config"}
_NOTES |= {"megatron_core", "qalora_group_size", "ensure_weight_tying"}
# These begin from another base than the one that is named; PEFT can save what they give as a plain adapter.
_OTHER_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


class AdapterFilesError(ValueError):
    """Adapter files that cannot be used; `reason` is UPPER_SNAKE, the message names the setting or the tensor."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, slots=True, kw_only=True)
class PeftConfig:
    """What of a LoRA's config says how it computes. Patterns are PEFT's: regular expressions for the end of a name."""

    r: int
    alpha: float
    target_modules: str | tuple[str, ...]  # a regular expression for the whole name, or endings of names
    exclude_modules: str | tuple[str, ...] = ()
    layers: frozenset[int] | None = None  # all when None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rslora: bool = False  # alpha / sqrt(rank), not alpha / rank (Kalajdzievski 2023, arXiv 2312.03732)
    dora: bool = False

    def targets(self, site: Site) -> bool:
        """Whether the adapter acts there."""
        inside = self.layers is None or site.layer in self.layers
        return inside and _named(site.theirs, self.target_modules) and not _named(site.theirs, self.exclude_modules)

    def rank(self, site: Site) -> int:
        """The rank at a site."""
        return _by_pattern(self.rank_pattern, site.theirs, self.r)

    def scale(self, site: Site) -> float:
        """The factor of the product at a site."""
        rank = self.rank(site)
        return _by_pattern(self.alpha_pattern, site.theirs, self.alpha) / (math.sqrt(rank) if self.rslora else rank)


def _named(name: str, wanted: str | tuple[str, ...]) -> bool:
    if wanted == "all-linear":
        return True
    if isinstance(wanted, str):
        return _matches(wanted, name)
    return any(name == ending or name.endswith(f".{ending}") for ending in wanted)


def _matches(pattern: str, name: str) -> bool:
    """Patterns come from clients: one that would run for ever is given up, and meanwhile other threads go on."""
    try:
        return regex.fullmatch(pattern, name, timeout=_MATCH_S, concurrent=True) is not None
    except TimeoutError as error:
        raise AdapterFilesError(
            "BAD_CONFIG", f"{pattern[:80]!r} takes too long to match {name}: simplify it"
        ) from error


def _by_pattern(pattern: Mapping[str, Number], name: str, default: Number) -> Number:
    found = (value for key, value in pattern.items() if _matches(rf"(.*\.)?({key})$", name))
    return next(found, default)


def read_config(folder: Path) -> PeftConfig:
    """The folder's config. Raises AdapterFilesError: NO_CONFIG, BAD_CONFIG or UNSUPPORTED_SETTING."""
    try:
        told = json.loads((folder / CONFIG_FILE).read_text())
    except OSError as error:
        raise AdapterFilesError("NO_CONFIG", f"{folder} has no {CONFIG_FILE} that can be read") from error
    except ValueError as error:
        raise AdapterFilesError("BAD_CONFIG", f"{CONFIG_FILE} is no JSON: {error}") from error
    if not isinstance(told, dict):
        raise AdapterFilesError("BAD_CONFIG", f"{CONFIG_FILE} is no JSON object")
    _check_supported(told)
    try:
        return _config(told)
    except (KeyError, TypeError, ValueError, regex.error) as error:
        raise AdapterFilesError("BAD_CONFIG", f"{CONFIG_FILE}: {error!r}") from error


def _check_supported(told: Mapping[str, Any]) -> None:
    if told.get("peft_type") != "LORA":
        raise _unsupported("peft_type", told.get("peft_type"), "LORA is what can be served")
    if told.get("bias", "none") != "none":
        raise _unsupported("bias", told["bias"], "train with bias none")
    if told.get("modules_to_save"):
        raise _unsupported("modules_to_save", told["modules_to_save"], "whole modules need a merged model")
    start = told.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_OTHER_BASE):
        raise _unsupported("init_lora_weights", start, "save it with path_initial_model_for_weight_conversion")
    for name, value in told.items():
        if name not in _READ | _NOTES and name not in ("modules_to_save",) and value not in (None, False, [], {}, ""):
            raise _unsupported(name, value, "adapters that use it cannot be served")


def _unsupported(name: str, value: object, advice: str) -> AdapterFilesError:
    return AdapterFilesError("UNSUPPORTED_SETTING", f"{CONFIG_FILE}: {name} is {value!r}: {advice}")


def _config(told: Mapping[str, Any]) -> PeftConfig:
    layers = told.get("layers_to_transform")
    config = PeftConfig(
        r=int(told["r"]),
        alpha=float(told["lora_alpha"]),
        target_modules=_names(told["target_modules"]),
        exclude_modules=_names(told.get("exclude_modules") or ()),
        layers=None if layers is None else frozenset([layers] if isinstance(layers, int) else map(int, layers)),
        rank_pattern={key: int(value) for key, value in (told.get("rank_pattern") or {}).items()},
        alpha_pattern={key: float(value) for key, value in (told.get("alpha_pattern") or {}).items()},
        rslora=bool(told.get("use_rslora")),
        dora=bool(told.get("use_dora")),
    )
    if min([config.r, *config.rank_pattern.values()]) < 1:
        raise ValueError("every rank must be at least 1")
    for pattern in (*config.rank_pattern, *config.alpha_pattern):
        _compiled(pattern)
    return config


def _compiled(pattern: str) -> None:
    if len(pattern) > _LONGEST_PATTERN:
        raise ValueError(f"a pattern of {len(pattern)} characters; {_LONGEST_PATTERN} are taken")
    regex.compile(pattern)


def _names(told: object) -> str | tuple[str, ...]:
    if isinstance(told, str):
        _compiled(told)
        return told
    if isinstance(told, list | tuple) and all(isinstance(name, str) for name in told):
        return tuple(told)
    raise TypeError("target_modules and exclude_modules must be a text or a list of texts")
