"""Request bodies of the OpenAI endpoints, strictly typed. Fields not listed here are judged by `unsupported`."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Ids = list[Annotated[int, Field(ge=0)]]


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")


class StreamOptions(BaseModel):
    """Options of a stream."""

    model_config = ConfigDict(strict=True, extra="allow")

    include_usage: bool | None = False
    include_obfuscation: bool | None = False  # accepted: nothing here is obfuscated


class SamplingBody(_Body):
    """What both endpoints share. None takes the model's default."""

    model: str
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = Field(None, description="0 or -1: all")
    min_p: float | None = Field(None, description="least probability as a share of the likeliest's; 0: off")
    repetition_penalty: float | None = Field(None, description="over prompt and output; 1: off")
    presence_penalty: float | None = Field(None, description="over the output, -2 to 2; 0: off")
    frequency_penalty: float | None = Field(None, description="over the output, -2 to 2; 0: off")
    logit_bias: dict[str, float] | None = Field(None, description="by token id: added to its logit, -100 to 100")
    seed: int | None = None
    n: int | None = 1
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = False
    priority: int | None = Field(0, description="smaller is sooner, -100 to 100; among tenants only each one's own")
    max_tokens: int | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    skip_special_tokens: bool | None = True


class ContentPart(BaseModel):
    """A part of a message's content; only text is read."""

    model_config = ConfigDict(strict=True, extra="allow")

    type: str = Field(examples=["text"])
    text: str | None = None


class ChatMessage(BaseModel):
    """One message of a conversation."""

    model_config = ConfigDict(strict=True, extra="allow")

    role: str
    content: str | list[ContentPart] | None = None
    name: str | None = None


class ChatBody(SamplingBody):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    logprobs: bool | None = False
    top_logprobs: int | None = None
    add_generation_prompt: bool | None = True


class CompletionBody(SamplingBody):
    """POST /v1/completions."""

    prompt: str | list[str] | Ids | list[Ids]
    logprobs: int | None = None
    echo: bool | None = False
