"""What the scheduler tells a trainer, without the wire."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lmesh_trainer.messages import Wish

Told = dict[str, Any]
"""A job's settings by the names of `JobSpec`'s fields, those that the client set; not checked yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gang:
    """A trainer's place among those that run a job together."""

    node: int
    nodes: int
    rendezvous: str  # host:port of node 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StartOrder:
    """A job to run."""

    job_id: str
    lease: int
    told: Told
    gang: Gang | None = None  # None: it is this trainer's alone

    @property
    def leads(self) -> bool:
        """Whether this trainer speaks for the run."""
        return self.gang is None or self.gang.node == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """What a run is asked; None: it is another trainer's by now, end it and say nothing more of it."""

    job_id: str
    lease: int
    wish: Wish | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidateOrder:
    """A dry run."""

    told: Told


@dataclass(frozen=True, slots=True, kw_only=True)
class InspectOrder:
    """What an uploaded folder is."""

    artifact: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOrder:
    """What to export. Names are those of the message, where they are described."""

    model: str
    quantisation: str
    adapter_artifact: str
    model_artifact: str
    format: str
    dtype: str


QueryOrder = ValidateOrder | InspectOrder | ExportOrder
