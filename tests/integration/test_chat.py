"""`lmesh chat` against a real gRPC server whose core is scripted: turns, errors, Ctrl-C, which model."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest
from lmesh_cli.chat import Chat, converse, pick_model
from lmesh_cli.mesh_link import ChatOptions, MeshError
from lmesh_gateway.generation import ChatPrompt
from rich.console import Console

from tests.scripted_core import ScriptedCore, served_grpc

ANSWER = "Hello wide world"


@pytest.fixture
def gateway() -> Iterator[tuple[str, ScriptedCore]]:
    with served_grpc() as running:
        yield running


class Terminal:
    """Lines typed one after the other, and what was written."""

    def __init__(self, *lines: str) -> None:
        self._lines = list(lines)
        self.out, self._notes = io.StringIO(), io.StringIO()
        self.notes = Console(file=self._notes, width=200)

    def read(self, prompt: str) -> str:
        if not self._lines:
            raise EOFError
        return self._lines.pop(0)

    @property
    def remarks(self) -> str:
        return self._notes.getvalue()


def chat(address: str, terminal: Terminal, model: str = "m", **options: float) -> Chat:
    return Chat(
        address, model, options=ChatOptions(**options), system="Be brief.", out=terminal.out, notes=terminal.notes
    )


def turns(core: ScriptedCore) -> list[list[tuple[str, str]]]:
    """(role, content) of each request's conversation."""
    prompts = [request.prompt for request in core.requests]
    assert all(isinstance(prompt, ChatPrompt) for prompt in prompts)
    return [[(m["role"], m["content"]) for m in prompt.messages] for prompt in prompts]


def test_a_conversation_remembers_its_turns(gateway: tuple[str, ScriptedCore]) -> None:
    address, core = gateway
    terminal = Terminal("hi", "", "and now?", "/reset", "again", "/exit", "never read")
    converse(chat(address, terminal, temperature=0.5, max_tokens=9), terminal.notes, terminal.read)
    opening = [("system", "Be brief."), ("user", "hi")]
    assert turns(core) == [
        opening,
        [*opening, ("assistant", ANSWER), ("user", "and now?")],
        [("system", "Be brief."), ("user", "again")],
    ]
    assert terminal.out.getvalue() == f"{ANSWER}\n" * 3
    assert "3 tokens in (2 cached), 3 out" in terminal.remarks
    sent = core.requests[0]
    assert (sent.sampling.temperature, sent.sampling.top_p, sent.stops.max_tokens) == (0.5, None, 9)


def test_an_error_ends_only_its_turn(gateway: tuple[str, ScriptedCore]) -> None:
    address, core = gateway
    terminal = Terminal("hi", "/exit")
    converse(chat(address, terminal, model="full"), terminal.notes, terminal.read)
    assert "QUEUE_FULL: busy" in terminal.remarks
    assert len(core.requests) == 1


def test_ctrl_c_stops_the_answer_and_cancels_the_request(gateway: tuple[str, ScriptedCore]) -> None:
    class Impatient(io.StringIO):
        def write(self, text: str) -> int:
            if self.getvalue().endswith("xxx") and text == "x":
                raise KeyboardInterrupt
            return super().write(text)

    address, core = gateway
    terminal = Terminal()
    terminal.out = Impatient()
    talk = chat(address, terminal, model="endless")
    assert talk.ask("go on").startswith("xxx")
    assert terminal.out.getvalue().endswith(" [stopped]\n")
    assert core.cancelled.wait(10)


def test_which_model(gateway: tuple[str, ScriptedCore]) -> None:
    address, _ = gateway
    assert pick_model(address, None) == "m"
    assert pick_model(address, "m") == "m"
    with pytest.raises(MeshError, match="no model 'x'; served: m"):
        pick_model(address, "x")
    with pytest.raises(MeshError, match="no gateway answers"):
        pick_model("127.0.0.1:1", None)
