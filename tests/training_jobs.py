"""Small jobs for tests: a tiny model, a dataset that it can learn, and what a job said."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from lmesh_trainer import events
from lmesh_trainer.job import never, run_job
from lmesh_trainer.messages import Wish
from lmesh_trainer.spec import DatasetSpec, JobSpec, OptimiserSpec

from tests.tiny_model import save_tiny_llama

E = TypeVar("E")
# Every turn closes with the end-of-sequence token, and what a turn adds follows the prompt for it.
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def save_model(folder: Path) -> Path:
    return save_tiny_llama(folder, chat_template=TEMPLATE)


def save_dataset(path: Path, count: int = 24) -> Path:
    """Chats of 30 to 90 tokens."""
    lines = []
    for i in range(count):
        question = f"what comes after {i}?" + " please" * (i % 5)
        messages = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": f"{i + 1}, surely" * (1 + i % 3)},
        ]
        lines.append(json.dumps({"messages": messages}))
    path.write_text("\n".join(lines) + "\n")
    return path


@dataclass
class Heard:
    """What a job reported."""

    said: list[events.Event] = field(default_factory=list)

    def __call__(self, event: events.Event) -> None:
        # As it travels: whatever cannot be encoded fails here.
        self.said.append(msgspec.msgpack.decode(msgspec.msgpack.encode(event), type=events.Event))

    def of(self, kind: type[E]) -> list[E]:
        return [event for event in self.said if isinstance(event, kind)]

    @property
    def losses(self) -> list[float]:
        return [step.loss for step in self.of(events.StepDone)]

    @property
    def ended(self) -> events.Ended:
        (found,) = self.of(events.Ended)
        assert self.said[-1] == found
        return found


def spec(model: Path, rows: Path, **options: Any) -> JobSpec:
    """20 updates of 5 rows, packed into microbatches of at most 200 tokens."""
    defaults: dict[str, Any] = {
        "dataset": DatasetSpec(source=str(rows)),
        "optimiser": OptimiserSpec(learning_rate=1e-2, lr_scheduler_type="cosine", warmup_steps=2),
        "max_steps": 20,
        "batch_size": 5,
        "micro_tokens": 200,
        "threads": 1,
        "device": "cpu",
    }
    return JobSpec(model=str(model), **(defaults | options))


def run(job: JobSpec, folder: Path, asked: Callable[[], Wish | None] = never) -> Heard:
    heard = Heard()
    run_job(job, folder, heard, asked)
    return heard


class After:
    """Asks for something once so many steps were begun."""

    def __init__(self, steps: int, wish: Wish) -> None:
        self._left, self._wish = steps, wish

    def __call__(self) -> Wish | None:
        self._left -= 1
        return self._wish if self._left < 0 else None
