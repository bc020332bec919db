"""A random adapter of all sites, held by an engine."""

from __future__ import annotations

import torch
from lmesh_kernels.lora.factors import Factors, content_digest
from lmesh_kernels.lora.sites import sites
from lmesh_worker.engine.engine import Engine


def adapter_of(engine: Engine, rank: int, scale: float) -> str:
    """Has the engine hold a random adapter of all sites; its digest."""
    draw = torch.Generator().manual_seed(rank)
    adapter = {
        site: Factors(
            a=torch.randn(rank, shape.inputs, generator=draw) * 0.1,
            b=torch.randn(shape.outputs, rank, generator=draw) * 0.1,
            scale=scale,
        )
        for site, shape in sites(engine.decoder.config).items()
    }
    digest = content_digest(adapter)
    engine.adapters.bank.hold(engine.adapters.bank.prepare(digest, adapter))
    return digest
