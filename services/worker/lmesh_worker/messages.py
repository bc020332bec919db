"""What the worker's server process and its engine process say to each other.

msgspec structs over a socketpair, each frame a length-prefixed msgpack list. Ids, never text.
The server names a sequence by `key`, its own counter; slots and leases stay on its side.
"""

from __future__ import annotations

from enum import IntEnum

import msgspec


class Finish(IntEnum):
    """Why a sequence ended; the numbers are those of lmesh.worker.v1.SequenceFinish."""

    RUNNING = 0
    STOP = 1
    LENGTH = 2
    ABORTED = 3
    ERROR = 4


class Progress(IntEnum):
    """What the engine is doing; the watchdog does not take COMPILING for stuck."""

    OK = 1
    COMPILING = 2


class Params(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """Sampling and stopping of one sequence, resolved: the engine adds no defaults."""

    temperature: float = 0.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 means all
    seed: int = 0  # uint64
    max_tokens: int = 1  # new tokens, counted from prompt_len; 0 only with prompt_logprobs
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int = -1  # -1 none, else alternatives a token
    prompt_logprobs: int = -1  # -1 none, else alternatives a prompt token
    min_p: float = 0.0  # 0 means off
    repetition_penalty: float = 1.0  # of ids of the prompt and the output; 1 means off
    presence_penalty: float = 0.0  # of ids of the output
    frequency_penalty: float = 0.0  # of ids of the output, each time
    logit_bias: tuple[tuple[int, float], ...] = ()  # (id, what is added to its logit), each id once

    @property
    def penalises(self) -> bool:
        """Whether what was seen changes what is drawn."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


class Start(msgspec.Struct, array_like=True, tag=1, frozen=True, gc=False):
    """Run one sequence."""

    key: int
    request_id: str
    choice: int
    ids: list[int]  # prompt, then ids already delivered
    prompt_len: int
    params: Params
    cache_salt: str = ""
    priority: int = 0  # smaller is sooner
    adapter: str = ""  # content digest of the adapter that it runs with; empty for the base alone


class Abort(msgspec.Struct, array_like=True, tag=2, frozen=True, gc=False):
    """Drop one sequence; unknown keys are ignored (it may just have ended)."""

    key: int


class Shutdown(msgspec.Struct, array_like=True, tag=3, frozen=True, gc=False):
    """Leave after the step in flight."""


class LoadAdapter(msgspec.Struct, array_like=True, tag=4, frozen=True, gc=False):
    """Read an adapter's folder, check it against its content digest and hold it; answered by `AdapterLoaded`."""

    digest: str
    folder: str  # in PEFT's layout


class DropAdapter(msgspec.Struct, array_like=True, tag=5, frozen=True, gc=False):
    """Take no new sequence with it, and let it go when the last that runs has ended; unknown ones are ignored."""

    digest: str


Command = Start | Abort | Shutdown | LoadAdapter | DropAdapter


class Load(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """The engine's gauges and counters after a step (counters since boot)."""

    running: int
    waiting: int
    kv_blocks_used: int
    steps: int
    prefix_query_tokens: int
    prefix_hit_tokens: int
    preemptions: int
    prompt_tokens: int
    generated_tokens: int


class Logprobs(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """Log-probabilities of one sequence's tokens in this step, in columns."""

    entry: int  # index into StepReport.keys
    prompt: bool  # the prompt's (positions 1 and on) rather than new tokens'
    chosen: list[float]
    k: int
    top_ids: list[int]  # k a token, best first
    top_logprobs: list[float]


class SequenceError(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """Why a sequence failed; reason is UPPER_SNAKE, message holds no internals."""

    entry: int
    reason: str
    message: str


class Timing(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """Once a sequence, with its first output."""

    entry: int
    cached_tokens: int
    queue_us: int
    prefill_us: int
    preemptions: int


class Ready(msgspec.Struct, array_like=True, tag=11, frozen=True, gc=False):
    """The engine has loaded its model and planned its memory."""

    device: str
    max_model_len: int
    vocab_size: int
    block_size: int
    kv_blocks: int
    max_seqs: int
    max_step_tokens: int
    weights_version: int
    plan: dict[str, int]  # the memory plan, bytes by line
    pid: int
    kv_format: str  # part of the root of every block's hash
    kv_granule_blocks: int  # a granule of the prefix index


class StepReport(msgspec.Struct, array_like=True, tag=12, frozen=True, gc=False):
    """One step's outputs in columns, sequence i being keys[i]; also sent, empty, when only gauges changed.

    `kv_added` and `kv_removed` tell of granules of the prefix cache, hashes end to end: what became findable and what
    no longer is, since the report before.
    """

    keys: list[int]
    start_pos: list[int]
    n_new: list[int]
    ids: list[int]  # CSR by n_new
    finish: list[int]
    load: Load
    weights_version: int
    step_us: int
    logprobs: list[Logprobs] = []
    errors: list[SequenceError] = []
    timings: list[Timing] = []
    kv_added: bytes = b""
    kv_removed: bytes = b""


class ProgressChange(msgspec.Struct, array_like=True, tag=13, frozen=True, gc=False):
    """The engine entered or left a phase in which no step is committed for good reason."""

    progress: int


class Fatal(msgspec.Struct, array_like=True, tag=14, frozen=True, gc=False):
    """The engine cannot go on; it exits after this."""

    reason: str
    message: str


class AdapterLoaded(msgspec.Struct, array_like=True, tag=15, frozen=True, gc=False):
    """An adapter is held, or why it is not."""

    digest: str
    reason: str = ""  # UPPER_SNAKE; empty when it is held
    message: str = ""
    rank: int = 0  # its largest
    bytes: int = 0


Report = Ready | StepReport | ProgressChange | Fatal | AdapterLoaded
