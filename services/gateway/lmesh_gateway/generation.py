"""What the gateway's faces (gRPC and HTTP) and its core say to each other: requests, events, served models.

Everything here is a plain value; no protobuf, no HTTP. Failures travel as `lmesh_gateway.errors` (ServiceErrors).
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias

from lmesh_kernels.text.generation import GenerationDefaults
from lmesh_kernels.text.tokenizer import TextTokenizer

DETACH_TTL_S = 60.0  # of a request that is to outlive its client and does not say for how long
FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TextPrompt:
    """Plain text; tokenized with the model's special tokens (one BOS where it has one)."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenPrompt:
    """Token ids, used exactly as given."""

    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatPrompt:
    """A conversation for the model's chat template; each message has at least `role` and `content`."""

    messages: tuple[Mapping[str, Any], ...]
    add_generation_prompt: bool = True


Prompt: TypeAlias = TextPrompt | TokenPrompt | ChatPrompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How to pick tokens. None takes the model's default, then the neutral value; a missing seed is drawn."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    n: int = 1
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()  # (id, what is added to its logit), each id once


@dataclass(frozen=True, slots=True, kw_only=True)
class StopRules:
    """When to stop. `max_tokens` None is what the context leaves; stop strings are not part of the text."""

    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputOptions:
    """What to return besides text; log-probabilities are counts of alternatives, 0 being the chosen token alone."""

    logprobs: int | None = None
    prompt_logprobs: int | None = None
    keep_special_tokens: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One request, not yet validated. `deadline_s` bounds the whole, `queue_timeout_s` the wait for a worker."""

    model: str
    prompt: Prompt
    request_id: str | None = None
    sampling: Sampling = field(default_factory=Sampling)
    stops: StopRules = field(default_factory=StopRules)
    output: OutputOptions = field(default_factory=OutputOptions)
    deadline_s: float | None = None
    queue_timeout_s: float | None = None
    priority: int = 0  # smaller is sooner
    detach_ttl_s: float | None = None  # None: cancelled when its client goes away; else it runs on for so long
    sync: bool = False  # ids are shown when the ledger has them
    tenant: str = ""
    traceparent: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumeRequest:
    """Asks for the rest of a request. `cursor` is how many ids of each choice were received; missing ones are 0."""

    request_id: str
    cursor: tuple[int, ...] = ()
    tenant: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """One token's natural log-probability, of the model's distribution before anything that sampling does to it."""

    id: int
    logprob: float
    text: str
    raw: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprobs:
    """A token and its best alternatives, best first; `top` holds the token itself if it is among them."""

    token: TokenLogprob
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """First event: tokenized, and admitted by the scheduler. `created` is Unix time in seconds."""

    request_id: str
    model: str
    prompt_ids: tuple[int, ...]
    seed: int
    created: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """New output of one choice, as much of it as came since the last one.

    `text` never holds part of a character and may lag behind `token_ids`; `logprobs` has one entry an id where asked
    for. `prompt_logprobs` comes once, in the first Delta of choice 0, with one entry for each prompt id but the first.
    """

    choice: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoiceEnd:
    """A choice is complete; nothing more comes of it. `stop_string` or `stop_token_id` say what ended it."""

    choice: int
    reason: FinishReason
    stop_string: str | None = None
    stop_token_id: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens of the whole call; `completion_tokens` over all choices, up to and with each one's stop."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Finish:
    """Last event: every choice's end in order of choice, and the counts."""

    choices: tuple[ChoiceEnd, ...]
    usage: Usage
    durable: bool = False  # the ledger holds all of it


Event: TypeAlias = Accepted | Delta | ChoiceEnd | Finish


class Generator(Protocol):
    """Runs requests on the mesh."""

    def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """Yields Accepted, then Deltas and one ChoiceEnd a choice (its last event), then Finish.

        Nothing happens before the first `anext`. Closing the iterator (`aclose`, or cancelling the task that awaits
        it) cancels the request. Any failure is raised as a ServiceError; what was yielded before it stays valid.
        A slow reader gets fewer, larger Deltas, and keeps nobody else waiting.
        """
        ...

    def resume(self, request: ResumeRequest) -> AsyncGenerator[Event, None]:
        """As `generate`, from the cursor on, of a request that lives or ended lately; whoever read it before is ended.

        What came before has no log-probabilities. Closing the iterator does what the request asked for.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """A model that some worker serves now and whose tokenizer is loaded here. `created` is Unix time in seconds.

    `id` is what clients ask for and are shown; `base` the model's own id, which other services and metrics know; they
    differ where an `adapter` (its content digest, "" for none) goes with it. `digest` is the base's.
    """

    id: str
    base: str
    adapter: str = ""
    digest: str
    max_model_len: int
    vocab_size: int
    created: float
    workers: int
    tokenizer: TextTokenizer
    defaults: GenerationDefaults
    longest_token_bytes: int = 0  # 0: not known


class ModelDirectory(Protocol):
    """The models that can be asked for now."""

    def list(self, tenant: str) -> list[ServedModel]:
        """All of them, each followed by the tenant's adapters of it."""
        ...

    def get(self, model: str, tenant: str) -> ServedModel:
        """What the tenant means by that id: a model, `model:adapter` or `model:adapter@version`.

        Raises ModelNotFoundError, ModelUnusableError, or ModelLoadingError while its tokenizer is being loaded.
        """
        ...

    def pinned(self, base: str, *, adapter: str, shown: str) -> ServedModel:
        """A model with the adapter of that content digest, published or not, shown as `shown`; raises as `get`."""
        ...
