"""What a job says of itself while it runs, torch-free: from the job's process to whoever watches."""

from __future__ import annotations

from enum import StrEnum

import msgspec


class Phase(StrEnum):
    """What a job is busy with."""

    LOADING_MODEL = "loading_model"
    LOADING_DATASET = "loading_dataset"
    REHEARSING = "rehearsing"
    TRAINING = "training"
    FINALIZING = "finalizing"


class Outcome(StrEnum):
    """How a job ends."""

    COMPLETED = "completed"
    STOPPED = "stopped"  # as asked, with a checkpoint
    CANCELLED = "cancelled"
    FAILED = "failed"


class PhaseBegun(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The job goes over to another phase."""

    phase: Phase


class TokenShown(msgspec.Struct, frozen=True, array_like=True):
    """One token of a row that is shown."""

    id: int
    text: str
    trained: bool


class DatasetReady(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """What the dataset turned out to be, and its first rows as the model will see them."""

    rows: int
    eval_rows: int
    tokens: int
    trained_tokens: int
    longest: int
    dropped: int
    truncated: int
    skipped_turns: int
    preview: list[list[TokenShown]]
    streaming: bool = False  # counts are of the first rows alone, read to try the stream


class PlanMade(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """What the job will take."""

    lines: dict[str, int]  # bytes
    free_bytes: int
    micro_tokens: int
    recompute: str
    steps: int
    trained_parameters: int


class StepDone(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """One update; names as transformers' trainer has them."""

    global_step: int
    epoch: float
    loss: float
    grad_norm: float
    learning_rate: float
    mean_token_accuracy: float
    num_tokens: int  # so far
    tokens_per_second: float  # of this step, trained ones
    step_time: float  # seconds
    peak_bytes: int
    applied: bool = True


class Evaluated(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The held-out rows."""

    global_step: int
    eval_loss: float
    eval_mean_token_accuracy: float


class CheckpointSaved(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A checkpoint is whole."""

    global_step: int
    folder: str
    seconds: float = 0.0  # that it took to write, synced


class Published(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """What the job made is whole on disk."""

    folder: str
    digest: str


class Ended(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The last word."""

    outcome: Outcome
    reason: str = ""  # UPPER_SNAKE, for FAILED
    message: str = ""


class Stored(msgspec.Struct, frozen=True, kw_only=True):
    """What a job made is in the artifact store. The trainer's server says this, not the job."""

    artifact: str  # of the folder
    adapter_digest: str  # content digest; empty for a full model
    manifest: str  # JSON


Event = PhaseBegun | DatasetReady | PlanMade | StepDone | Evaluated | CheckpointSaved | Published | Ended
Reported = Event | Stored
