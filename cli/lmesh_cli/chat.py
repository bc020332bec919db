"""`lmesh chat`: a conversation in the terminal, or one question, streamed as it is generated."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import closing
from typing import TextIO

from rich.console import Console

from lmesh_cli import mesh_link
from lmesh_cli.mesh_link import ChatOptions, ChatPiece, MeshError

_HELP = "Enter sends; Ctrl-C stops an answer; /reset forgets the conversation; /exit or Ctrl-D leaves."


class Chat:
    """One conversation with one model; answers stream to `out`, remarks to `notes`."""

    def __init__(
        self,
        address: str,
        model: str,
        *,
        options: ChatOptions,
        system: str = "",
        timeout_s: float = 600.0,
        out: TextIO | None = None,
        notes: Console | None = None,
    ) -> None:
        self._address = address
        self._model = model
        self._options = options
        self._opening = [("system", system)] if system else []
        self._messages = list(self._opening)
        self._timeout_s = timeout_s
        self._out = out or sys.stdout
        self._notes = notes or Console(stderr=True)

    def reset(self) -> None:
        """Forgets the conversation, not the system message."""
        self._messages = list(self._opening)

    def ask(self, question: str) -> str:
        """Streams the answer and returns it. Ctrl-C cancels the request and keeps what has come. Raises MeshError."""
        turn = [*self._messages, ("user", question)]
        text, last, begin = "", ChatPiece(), time.monotonic()
        stream = mesh_link.chat(self._address, self._model, turn, self._options, self._timeout_s)
        with closing(stream):  # type: ignore[type-var]
            try:
                for piece in stream:
                    self._write(piece.text)
                    text, last = text + piece.text, piece if piece.last else last
            except KeyboardInterrupt:
                self._write(" [stopped]")
        self._write("\n")
        self._note(last, time.monotonic() - begin)
        self._messages = [*turn, ("assistant", text)]
        return text

    def _write(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()

    def _note(self, last: ChatPiece, seconds: float) -> None:
        if not last.last:
            return
        rate = last.completion_tokens / seconds if seconds > 0 else 0.0
        cut = ", cut at the token limit" if last.cut else ""
        self._notes.print(
            f"[dim]{last.prompt_tokens} tokens in ({last.cached_tokens} cached), "
            f"{last.completion_tokens} out, {rate:.1f} tok/s{cut}[/dim]",
            highlight=False,
        )


def pick_model(address: str, wanted: str | None) -> str:
    """`wanted` (a model, or `model:adapter`), or the only model. Raises MeshError: none fits, or nobody answers."""
    try:
        served = mesh_link.list_models(address)
    except MeshError as error:
        if error.reason != "UNAVAILABLE":
            raise
        raise MeshError("", f"no gateway answers at {address}; `lmesh up` starts one") from error
    # Whether the adapter is there says the gateway itself: the list need not have its versions.
    if wanted is not None and wanted.partition(":")[0] not in served:
        raise MeshError("MODEL_NOT_FOUND", f"no model {wanted!r}; served: {', '.join(served) or 'none'}")
    models = [model for model in served if ":" not in model]
    if wanted is None and len(models) != 1:
        raise MeshError("", f"say which model: {', '.join(models)}" if models else "no model is served yet")
    return wanted or models[0]


def converse(chat: Chat, notes: Console, read: Callable[[str], str] = input) -> None:
    """Reads questions until the end of input; an error ends only its own turn."""
    notes.print(_HELP, style="dim", highlight=False)
    while True:
        try:
            line = read("> ").strip()
        except (EOFError, KeyboardInterrupt):
            notes.print()
            return
        if line in ("/exit", "/quit"):
            return
        if line == "/reset":
            chat.reset()
        elif line:
            try:
                chat.ask(line)
            except MeshError as error:
                notes.print(str(error), style="red", markup=False)
