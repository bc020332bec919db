"""A job's course while one watches: a live bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from lmesh_cli.training.records import (
    Checkpoint,
    DatasetReport,
    Evaluation,
    Event,
    Made,
    MemoryPlan,
    PhaseBegun,
    Published,
    StateChanged,
    Step,
)
from lmesh_cli.training.report import duration, size

_RECENT = 20  # steps that the rest's time is reckoned from
_PLAIN_EVERY_S = 1.0


class Display(Protocol):
    """Shows a job's events."""

    def show(self, event: Event) -> None:
        """The next one."""

    def close(self) -> None:
        """There are no more."""


class Course:
    """What is known of a job from its events so far."""

    def __init__(self) -> None:
        self.steps = 0  # of the whole job; 0 until it is planned
        self.step: Step | None = None
        self.eval_loss: float | None = None
        self._recent: deque[float] = deque(maxlen=_RECENT)

    def take(self, event: Event) -> None:
        """The next event."""
        match event:
            case MemoryPlan():
                self.steps = event.steps
            case Step():
                self.step = event
                self._recent.append(event.seconds)
            case Evaluation():
                self.eval_loss = event.loss
            case _:
                pass

    @property
    def seconds_left(self) -> float | None:
        """By the last steps' pace; None before there is one."""
        if self.step is None or not self.steps:
            return None
        # Not by the clock: who begins to watch late hears the past at once.
        return (self.steps - self.step.number) * sum(self._recent) / len(self._recent)

    def figures(self) -> str:
        """The last step's figures in one line."""
        step = self.step
        if step is None:
            return ""
        parts = [f"loss {step.loss:.4f}" if step.applied else "loss not finite, step skipped"]
        if self.eval_loss is not None:
            parts.append(f"eval {self.eval_loss:.4f}")
        parts.append(f"grad {step.grad_norm:.2f}")
        parts.append(f"lr {step.learning_rate:.2e}")
        parts.append(f"{step.tokens_per_second:,.0f} tok/s")
        parts.append(size(step.peak_bytes))
        if (left := self.seconds_left) is not None:
            parts.append(f"eta {duration(left)}")
        return "  ".join(parts)


class PlainDisplay:
    """A line a step, at most one a second, and always the last one."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._course = Course()
        self._due = 0.0
        self._held: str | None = None  # a step's line that came too soon after another

    def show(self, event: Event) -> None:
        """See Display."""
        if not isinstance(event, Step):
            self._let_go()
        self._course.take(event)
        if isinstance(event, Step):
            total = f"/{self._course.steps}" if self._course.steps else ""
            self._held = f"step {event.number}{total}  {self._course.figures()}"
            if (now := self._clock()) >= self._due:
                self._due = now + _PLAIN_EVERY_S
                self._let_go()
        elif line := told(event):
            self._say(line)

    def close(self) -> None:
        """See Display."""
        self._let_go()

    def _let_go(self) -> None:
        if self._held is not None:
            self._say(self._held)
            self._held = None

    def _say(self, line: str) -> None:
        self._console.print(Text(line), soft_wrap=True)


class LiveDisplay:
    """A bar that goes with the steps, its figures below; what else happens scrolls above."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._course = Course()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns, TextColumn("{task.fields[figures]}", markup=False), console=console)
        self._task = self._bar.add_task("waiting for a trainer", total=None, figures="")
        self._bar.start()

    def show(self, event: Event) -> None:
        """See Display."""
        self._course.take(event)
        course = self._course
        match event:
            case PhaseBegun():
                self._bar.update(self._task, description=event.phase.replace("_", " "))
            case MemoryPlan():
                self._bar.update(self._task, total=event.steps)
            case Step() | Evaluation():
                done = course.step.number if course.step is not None else 0
                self._bar.update(self._task, completed=done, figures=course.figures())
            case StateChanged():
                self._bar.update(self._task, description=event.state.value)
            case _:
                pass
        if not isinstance(event, PhaseBegun | Evaluation) and (line := told(event)):
            self._console.print(Text(line), soft_wrap=True)

    def close(self) -> None:
        """See Display."""
        self._bar.stop()


def told(event: Event) -> str:
    """An event other than a step in one line; empty for what says nothing more."""
    match event:
        case StateChanged():
            why = " ".join(part for part in (event.reason, event.message) if part)
            return f"{event.state.value}{': ' * bool(why)}{why}"
        case PhaseBegun():
            return event.phase.replace("_", " ")
        case DatasetReport():
            held = f", {event.eval_rows:,} held out" if event.eval_rows else ""
            what = "stream, its first" if event.streaming else "dataset:"
            return f"{what} {event.rows:,} rows{held}, {event.tokens:,} tokens, {event.trained_tokens:,} trained"
        case MemoryPlan():
            needed = size(sum(event.lines.values()))
            return f"plan: {event.steps:,} updates of {event.trained_parameters:,} parameters in {needed}"
        case Evaluation():
            return f"evaluation after step {event.step}: loss {event.loss:.4f}, accuracy {event.accuracy:.1%}"
        case Checkpoint():
            return f"checkpoint at step {event.step}"
        case Made():
            return f"made: artifact {event.artifact}"
        case Published():
            return f"published: {event.adapter.id}"
        case _:
            return ""


def display(console: Console) -> Display:
    """The one that suits the console."""
    return LiveDisplay(console) if console.is_terminal else PlainDisplay(console)
