"""From prompts to ids: templates in the sandbox, tokenizing in threads, the event loop free throughout."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from lmesh_chassis.errors import ServiceError
from lmesh_kernels.text.sandbox import TemplateSandbox
from lmesh_kernels.text.template import TemplateError
from lmesh_kernels.text.tokenizer import TextTokenizer

from lmesh_gateway.errors import (
    NoChatTemplateError,
    TemplateFailedError,
    TemplateInvalidError,
    TemplateRefusedError,
    TemplateTimeoutError,
)
from lmesh_gateway.generation import ChatPrompt, Prompt, ServedModel, TokenPrompt
from lmesh_gateway.validation import check_text_length, prompt_field

_TEMPLATE_ERRORS: dict[str, type[ServiceError]] = {
    error.reason: error
    for error in (TemplateTimeoutError, TemplateInvalidError, TemplateRefusedError, TemplateFailedError)
}
# Below this a hop to a thread costs more than the tokenizing that it moves away.
_SHORT_CHARACTERS = 200


class PromptBuilder:
    """Turns prompts into ids. `threads` bounds how many are tokenized at the same time."""

    def __init__(self, sandbox: TemplateSandbox, *, threads: int) -> None:
        self._sandbox = sandbox
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="tokenize")

    async def ids(self, prompt: Prompt, model: ServedModel) -> Sequence[int]:
        """The prompt's ids; token prompts as they are. Raises NoChatTemplateError, a template's error, or
        ContextLengthExceededError for text that is far too long."""
        if isinstance(prompt, TokenPrompt):
            return prompt.ids
        if isinstance(prompt, ChatPrompt):
            # A template writes the special tokens itself: adding the tokenizer's own would double the BOS.
            text, add_special_tokens = await self._render(prompt, model), False
        else:
            text, add_special_tokens = prompt.text, True
        check_text_length(prompt_field(prompt), text, model)
        return await self._encode(model.tokenizer, text, add_special_tokens=add_special_tokens)

    async def _render(self, prompt: ChatPrompt, model: ServedModel) -> str:
        template = model.tokenizer.chat_template
        if not template:
            raise NoChatTemplateError(f"{model.id} has no chat template; send text or tokens", field="chat")
        try:
            return await self._sandbox.render(
                template,
                messages=[dict(message) for message in prompt.messages],
                add_generation_prompt=prompt.add_generation_prompt,
                special_tokens=model.tokenizer.special_tokens,
            )
        except TemplateError as error:
            raise _TEMPLATE_ERRORS.get(error.reason, TemplateFailedError)(error.message, field="chat") from error

    async def _encode(self, tokenizer: TextTokenizer, text: str, *, add_special_tokens: bool) -> list[int]:
        if len(text) <= _SHORT_CHARACTERS:
            return tokenizer.encode(text, add_special_tokens=add_special_tokens)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(
            self._pool, lambda: tokenizer.encode(text, add_special_tokens=add_special_tokens)
        )

    async def close(self) -> None:
        """Ends the threads and the template processes."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        await self._sandbox.close()
