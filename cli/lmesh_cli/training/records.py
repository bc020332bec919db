"""What the mesh says of jobs, datasets and adapters, as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum


class JobState(StrEnum):
    """Where a job is."""

    QUEUED = "queued"
    RUNNING = "running"
    COMPLETED = "completed"
    STOPPED = "stopped"
    CANCELLED = "cancelled"
    FAILED = "failed"
    UNKNOWN = "unknown"  # of a mesh that is newer than this command

    @property
    def ended(self) -> bool:
        """Whether nothing more happens by itself."""
        return self in (JobState.COMPLETED, JobState.STOPPED, JobState.CANCELLED, JobState.FAILED)

    @property
    def well(self) -> bool:
        """Whether it ended as its owner wanted."""
        return self in (JobState.COMPLETED, JobState.STOPPED)


@dataclass(frozen=True, kw_only=True, slots=True)
class StateChanged:
    """A job's new state."""

    state: JobState
    reason: str = ""
    message: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class PhaseBegun:
    """What a job is busy with now."""

    phase: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ShownToken:
    """One token of a row that is shown."""

    text: str
    trained: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetReport:
    """What a dataset turned out to be."""

    rows: int
    eval_rows: int
    tokens: int
    trained_tokens: int
    longest: int
    dropped: int
    truncated: int
    skipped_turns: int
    preview: tuple[tuple[ShownToken, ...], ...] = ()
    streaming: bool = False  # a stream: of its first rows alone


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPlan:
    """What a job will take."""

    lines: Mapping[str, int]  # bytes
    free_bytes: int
    micro_tokens: int
    recompute: str
    steps: int
    trained_parameters: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One update."""

    number: int
    epoch: float
    loss: float
    grad_norm: float
    learning_rate: float
    accuracy: float
    tokens_per_second: float
    seconds: float
    peak_bytes: int
    applied: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """The held-out rows, scored."""

    step: int
    loss: float
    accuracy: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A checkpoint is whole."""

    step: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Made:
    """What the job made is stored."""

    artifact: str
    adapter_digest: str  # empty of a whole model


@dataclass(frozen=True, kw_only=True, slots=True)
class Adapter:
    """One published version."""

    model: str
    name: str
    version: int
    digest: str
    artifact: str
    job_id: str
    workers: int
    created: datetime | None
    rank: int | None  # where its manifest says one

    @property
    def id(self) -> str:
        """What a request asks for to get this version."""
        return f"{self.model}:{self.name}@{self.version}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """It serves."""

    adapter: Adapter


Event = StateChanged | PhaseBegun | DatasetReport | MemoryPlan | Step | Evaluation | Checkpoint | Made | Published


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One job as the mesh knows it."""

    id: str
    model: str
    method: str
    publish_as: str
    state: JobState
    reason: str
    message: str
    created: datetime | None
    changed: datetime | None
    trainer: str
    attempts: int
    last_step: Step | None
    artifact: str
    adapter_digest: str
    settings: Mapping[str, object] = field(default_factory=dict)  # its spec, by the fields' names


@dataclass(frozen=True, kw_only=True, slots=True)
class Export:
    """An export that is stored."""

    artifact: str
    survival: float  # share of the adapter's effect that the written weights hold
