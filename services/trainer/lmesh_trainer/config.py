"""The trainer's settings, read from LMESH_TRAINER_* (see lmesh_chassis.settings)."""

from __future__ import annotations

import hashlib
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lmesh_chassis.settings import ChassisSettings


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainerSettings(ChassisSettings):
    """One device that trains. Zeros mean: planned from the device."""

    scheduler: str = "127.0.0.1:50052"
    id: str = ""  # stable name; empty: from the host's name and these settings
    address: str = "127.0.0.1:0"  # where health is served
    artifacts: Path  # folder of the artifact store, shared with the gateways
    # Folder of the jobs' folders, for every trainer that may go on with a job the same; empty: jobs below `artifacts`.
    jobs: Path | None = None
    keep_jobs_days: float = 30.0  # after the last write; as long as a scheduler's job_ttl_s jobs can be resumed
    keep_completed_jobs: int = 20  # folders of completed jobs that are kept even so long
    hub: bool = False  # whether jobs may name datasets of the Hugging Face hub

    device: Literal["auto", "cpu", "cuda", "rocm", "xpu"] = "auto"
    threads: int = 0
    world: int = 1  # processes of a run, under torchrun
    slots: int = 1  # jobs at once
    # host:port at which other trainers reach the first rank of a run here, and the ports after it for further slots;
    # empty: no job of several trainers.
    rendezvous: str = ""
    query_timeout_s: float = 1800.0  # of one dry run, inspection or export
    max_waiting_reports: int = (
        100_000  # of a run that goes on without a scheduler; beyond, its oldest steps are left out
    )

    def __post_init__(self) -> None:
        if self.threads < 0:
            raise ValueError("threads must be 0 (planned) or more")
        for name in ("world", "slots", "max_waiting_reports"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")
        host, _, port = self.rendezvous.rpartition(":")
        if self.rendezvous and not (host and port.isdecimal() and 0 < int(port) <= 65535 - self.slots):
            raise ValueError(f"rendezvous must be host:port, with a port for each slot, not {self.rendezvous!r}")
        if self.keep_jobs_days <= 0 or self.keep_completed_jobs < 0:
            raise ValueError("keep_jobs_days must be positive, keep_completed_jobs 0 or more")
        if self.query_timeout_s <= 0:
            raise ValueError("query_timeout_s must be positive")

    @property
    def jobs_folder(self) -> Path:
        """Where the jobs' folders lie."""
        return self.jobs or self.artifacts / "jobs"

    @property
    def trainer_id(self) -> str:
        """The stable name: the same for each boot with the same settings on the same host."""
        if self.id:
            return self.id
        devices = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        told = "\n".join((self.address, self.device, devices, str(self.jobs_folder.absolute())))
        return f"trainer-{socket.gethostname()}-{hashlib.sha256(told.encode()).hexdigest()[:6]}"
