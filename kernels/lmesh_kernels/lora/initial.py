"""The adapter that training begins with: the base unchanged, and the same for the same seed."""

from __future__ import annotations

import math
from collections.abc import Callable
from hashlib import sha256

import torch
from torch import Tensor

from lmesh_kernels.lora.factors import Adapter, Factors
from lmesh_kernels.lora.peft_config import AdapterFilesError, PeftConfig
from lmesh_kernels.lora.sites import Site, SiteShape, sites
from lmesh_kernels.models.config import ModelConfig


def initial_adapter(
    config: PeftConfig, model: ModelConfig, *, seed: int, weight: Callable[[Site], Tensor] | None = None
) -> Adapter:
    """a uniform in +-1/sqrt(inputs), as PEFT draws it (kaiming with a = sqrt(5)); b zero; float32 on the CPU.

    Every site draws from a generator of its own, so that a site's values do not depend on what else is targeted.
    `weight` gives a site's rows of the base, whose norms are DoRA's first magnitudes.
    Raises AdapterFilesError NO_TARGETS, ValueError for DoRA without `weight`.
    """
    wanted = {site: shape for site, shape in sites(model).items() if config.targets(site)}
    if not wanted:
        raise AdapterFilesError(
            "NO_TARGETS", f"target_modules {config.target_modules!r} name no projection of this model"
        )
    return {site: _factors(site, shape, config, seed, weight) for site, shape in wanted.items()}


def _factors(
    site: Site, shape: SiteShape, config: PeftConfig, seed: int, weight: Callable[[Site], Tensor] | None
) -> Factors:
    rank = config.rank(site)
    generator = torch.Generator().manual_seed(_site_seed(seed, site))
    bound = 1.0 / math.sqrt(shape.inputs)
    a = torch.empty(rank, shape.inputs).uniform_(-bound, bound, generator=generator)
    magnitude = None
    if config.dora:
        if weight is None:
            raise ValueError("DoRA begins with the norms of the base's rows")
        magnitude = torch.linalg.vector_norm(weight(site).float(), dim=1).cpu()
    return Factors(a=a, b=torch.zeros(shape.outputs, rank), scale=config.scale(site), magnitude=magnitude)


def _site_seed(seed: int, site: Site) -> int:
    return int.from_bytes(sha256(f"{seed}/{site.theirs}".encode()).digest()[:7], "little")
