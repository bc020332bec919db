"""What a watched job looks like: plain lines, and the report before it."""

from __future__ import annotations

import io
from dataclasses import replace

from lmesh_cli.training.progress import Course, LiveDisplay, PlainDisplay, display
from lmesh_cli.training.records import (
    Checkpoint,
    DatasetReport,
    Evaluation,
    JobState,
    MemoryPlan,
    PhaseBegun,
    ShownToken,
    StateChanged,
    Step,
)
from lmesh_cli.training.report import bracketed, coloured, duration, show_report, size
from rich.console import Console

PLAN = MemoryPlan(
    lines={"weights": 3 << 30, "optimiser_state": 1 << 20},
    free_bytes=8 << 30,
    micro_tokens=2048,
    recompute="none",
    steps=100,
    trained_parameters=2_442_240,
)
ROW = (
    ShownToken(text="user: hi ", trained=False),
    ShownToken(text="Ah", trained=True),
    ShownToken(text="oy", trained=True),
)
REPORT = DatasetReport(
    rows=240,
    eval_rows=0,
    tokens=16000,
    trained_tokens=4000,
    longest=71,
    dropped=2,
    truncated=1,
    skipped_turns=0,
    preview=(ROW,),
)


def step(number: int, *, loss: float = 2.5, seconds: float = 2.0, applied: bool = True) -> Step:
    return Step(
        number=number,
        epoch=0.1,
        loss=loss,
        grad_norm=1.25,
        learning_rate=4.5e-4,
        accuracy=0.5,
        tokens_per_second=1234.5,
        seconds=seconds,
        peak_bytes=3 << 29,
        applied=applied,
    )


class Screen:
    def __init__(self, *, terminal: bool = False) -> None:
        self._file = io.StringIO()
        self.console = Console(file=self._file, force_terminal=terminal, width=160)

    @property
    def lines(self) -> list[str]:
        return self._file.getvalue().splitlines()


class TestPlain:
    def test_a_line_has_all_figures(self) -> None:
        screen = Screen()
        shown = PlainDisplay(screen.console, lambda: 0.0)
        shown.show(PLAN)
        shown.show(Evaluation(step=1, loss=2.75, accuracy=0.4))
        shown.show(step(10))
        shown.close()
        assert screen.lines == [
            "plan: 100 updates of 2,442,240 parameters in 3.0 GiB",
            "evaluation after step 1: loss 2.7500, accuracy 40.0%",
            "step 10/100  loss 2.5000  eval 2.7500  grad 1.25  lr 4.50e-04  1,234 tok/s  1.5 GiB  eta 3:00",
        ]

    def test_at_most_one_a_second_and_the_last(self) -> None:
        screen, now = Screen(), 0.0
        shown = PlainDisplay(screen.console, lambda: now)
        for number in range(1, 11):
            now = number * 0.3
            shown.show(step(number))
        shown.show(StateChanged(state=JobState.COMPLETED))
        shown.close()
        assert [line.split("  ")[0] for line in screen.lines] == ["step 1", "step 5", "step 9", "step 10", "completed"]

    def test_no_step_comes_twice(self) -> None:
        screen = Screen()
        shown = PlainDisplay(screen.console, lambda: 5.0)
        shown.show(step(1))
        shown.show(Checkpoint(step=1))
        shown.close()
        assert len(screen.lines) == 2

    def test_a_failure_says_why(self) -> None:
        screen = Screen()
        shown = PlainDisplay(screen.console)
        shown.show(PhaseBegun(phase="loading_dataset"))
        shown.show(StateChanged(state=JobState.FAILED, reason="BAD_COLUMN", message="line 3: [text] is empty"))
        assert screen.lines == ["loading dataset", "failed: BAD_COLUMN line 3: [text] is empty"]

    def test_a_skipped_step_is_told(self) -> None:
        course = Course()
        course.take(step(1, loss=float("nan"), applied=False))
        assert "loss not finite, step skipped" in course.figures()


def test_time_left_goes_by_the_last_steps() -> None:
    course = Course()
    course.take(PLAN)
    assert course.seconds_left is None
    for number in range(1, 41):
        course.take(step(number, seconds=9.0 if number <= 20 else 1.0))
    assert course.seconds_left == 60.0


def test_a_terminal_gets_a_bar() -> None:
    screen = Screen(terminal=True)
    shown = display(screen.console)
    assert isinstance(shown, LiveDisplay)
    for event in (PhaseBegun(phase="training"), PLAN, step(7), StateChanged(state=JobState.COMPLETED)):
        shown.show(event)
    shown.close()
    text = "\n".join(screen.lines)
    assert "7/100" in text and "loss 2.5000" in text
    assert isinstance(display(Screen().console), PlainDisplay)


class TestReport:
    def test_plain(self) -> None:
        screen = Screen()
        show_report(REPORT, PLAN, screen.console)
        text = "\n".join(screen.lines)
        assert "first row (trained tokens stand in [brackets]):" in text
        assert "user: hi [Ahoy]" in text
        assert "\x1b" not in text
        rows = {" ".join(line.split()) for line in screen.lines}
        assert {"rows 240", "trained tokens 4,000 (25%)", "longest row 71", "dropped 2", "truncated 1"} <= rows
        assert {"optimiser state 1.0 MiB", "in all 3.0 GiB of 8.0 GiB free", "updates 100"} <= rows

    def test_a_stream_is_said_to_be_one(self) -> None:
        screen = Screen()
        stream = replace(REPORT, streaming=True, eval_rows=4)
        show_report(stream, PLAN, screen.console)
        shown = PlainDisplay(screen.console)
        shown.show(stream)
        shown.close()
        rows = {" ".join(line.split()) for line in screen.lines}
        assert {"stream, its first rows", "rows tried 240", "rows held out 4"} <= rows
        assert screen.lines[-1] == "stream, its first 240 rows, 4 held out, 16,000 tokens, 4,000 trained"

    def test_terminal_has_colours(self) -> None:
        screen = Screen(terminal=True)
        show_report(REPORT, PLAN, screen.console)
        assert "\x1b[32mAh" in "\n".join(screen.lines)
        assert coloured(ROW).plain == "user: hi Ahoy"

    def test_brackets_in_the_text_stay(self) -> None:
        row = (ShownToken(text="[a]", trained=False), ShownToken(text="b", trained=True))
        assert bracketed(row) == "[a][b]"

    def test_units(self) -> None:
        assert [size(count) for count in (10, 2048, 5 << 20, 3 << 40)] == ["10 B", "2 KiB", "5.0 MiB", "3.0 TiB"]
        assert [duration(seconds) for seconds in (0, 45, 125.4, 3723)] == ["0:00", "0:45", "2:05", "1:02:03"]
