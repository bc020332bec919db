"""Chat templates: Jinja in a sandbox, with the names that published templates use."""

from __future__ import annotations

import json
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

Messages = list[dict[str, Any]]
_LONGEST_MESSAGE = 1000  # characters of an error's text, which the template may choose


class TemplateError(ValueError):
    """A template could not be rendered. `reason` is UPPER_SNAKE: TEMPLATE_INVALID, _REFUSED, _TIMEOUT or _FAILED."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message

    def __reduce__(self) -> tuple[type[TemplateError], tuple[str, str]]:
        return TemplateError, (self.reason, self.message)


class _Refusal(Exception):
    """The template called raise_exception."""


class _GenerationTag(Extension):
    """`{% generation %}` marks an assistant's tokens in some templates; here its body is simply rendered."""

    tags = {"generation"}  # noqa: RUF012 - the base class's form

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(value: object, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:  # noqa: ANN401
    # Jinja's own filter escapes for HTML, which a prompt must not be.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise_exception(message: str) -> NoReturn:
    raise _Refusal(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationTag]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    return environment


@lru_cache(maxsize=64)
def _compiled(template: str) -> jinja2.Template:
    return _environment().from_string(template)


def render(
    template: str,
    *,
    messages: Messages,
    add_generation_prompt: bool,
    special_tokens: dict[str, str],
    tools: list[dict[str, Any]] | None = None,
    extra: dict[str, Any] | None = None,
) -> str:
    """The prompt text of a conversation.

    `special_tokens` are names and texts (bos_token ...) that the template may write; `extra` further variables, which
    cannot replace messages, tools or add_generation_prompt.
    Runs in this process and so may loop or eat memory: what is not trusted goes through `TemplateSandbox`.
    Raises TemplateError.
    """
    variables = {
        "documents": None,
        **special_tokens,
        **(extra or {}),
        "messages": messages,
        "tools": tools,
        "add_generation_prompt": add_generation_prompt,
    }
    try:
        return _compiled(template).render(variables)
    except Exception as error:
        raise _named(error) from error


def _named(error: Exception) -> TemplateError:
    said = str(error)[:_LONGEST_MESSAGE]
    if isinstance(error, _Refusal):
        return TemplateError("TEMPLATE_REFUSED", f"the chat template refuses these messages: {said}")
    if isinstance(error, jinja2.TemplateSyntaxError):
        return TemplateError("TEMPLATE_INVALID", f"the chat template is no Jinja, line {error.lineno}: {said}")
    if isinstance(error, SyntaxError):
        return TemplateError("TEMPLATE_INVALID", f"the chat template is nested too deep: {said}")
    if isinstance(error, (RecursionError, MemoryError)):
        return TemplateError("TEMPLATE_FAILED", f"the chat template needs too much: {type(error).__name__}")
    return TemplateError("TEMPLATE_FAILED", f"the chat template failed: {said or type(error).__name__}")
