"""What a job would begin with, for a person: the dataset's counts, its first row with what is trained, the memory."""

from __future__ import annotations

from itertools import groupby

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lmesh_cli.training.records import DatasetReport, MemoryPlan, ShownToken

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_TRAINED = "green"


def show_report(dataset: DatasetReport, plan: MemoryPlan, console: Console) -> None:
    """Prints all of it."""
    console.print(dataset_table(dataset))
    if dataset.preview:
        hint = "trained tokens are coloured" if console.is_terminal else "trained tokens stand in [brackets]"
        console.print(f"first row ({hint}):", style="bold", highlight=False, markup=False)
        row = dataset.preview[0]
        console.print(coloured(row) if console.is_terminal else Text(bracketed(row)), soft_wrap=True)
    console.print(plan_table(plan))


def dataset_table(dataset: DatasetReport) -> Table:
    """Counts of rows and tokens."""
    table = Table("stream, its first rows" if dataset.streaming else "dataset", "", box=SIMPLE)
    table.columns[1].justify = "right"
    share = dataset.trained_tokens / dataset.tokens if dataset.tokens else 0.0
    lines = {
        "rows tried" if dataset.streaming else "rows": f"{dataset.rows:,}",
        "rows held out": f"{dataset.eval_rows:,}",
        "tokens": f"{dataset.tokens:,}",
        "trained tokens": f"{dataset.trained_tokens:,} ({share:.0%})",
        "longest row": f"{dataset.longest:,}",
        "dropped": f"{dataset.dropped:,}",
        "truncated": f"{dataset.truncated:,}",
    }
    if dataset.skipped_turns:  # rare, and a riddle to who has none
        lines["turns not trained"] = f"{dataset.skipped_turns:,} (their text depends on what follows)"
    for name, value in lines.items():
        table.add_row(name, value)
    return table


def plan_table(plan: MemoryPlan) -> Table:
    """Bytes by what they are for, and the job's size."""
    table = Table("memory", "", box=SIMPLE)
    table.columns[1].justify = "right"
    for name, count in sorted(plan.lines.items(), key=lambda line: -line[1]):
        table.add_row(name.replace("_", " "), size(count))
    table.add_row("in all", f"{size(sum(plan.lines.values()))} of {size(plan.free_bytes)} free")
    table.add_section()
    table.add_row("trained parameters", f"{plan.trained_parameters:,}")
    table.add_row("updates", f"{plan.steps:,}")
    table.add_row("tokens at once", f"{plan.micro_tokens:,}")
    table.add_row("recomputed", plan.recompute or "none")
    return table


def coloured(row: tuple[ShownToken, ...]) -> Text:
    """A row as a terminal shows it."""
    text = Text()
    for token in row:
        text.append(token.text, style=_TRAINED if token.trained else "dim")
    return text


def bracketed(row: tuple[ShownToken, ...]) -> str:
    """A row as a file shows it: runs of trained tokens in brackets."""
    runs = ((trained, "".join(token.text for token in run)) for trained, run in groupby(row, lambda t: t.trained))
    return "".join(f"[{text}]" if trained else text for trained, text in runs)


def size(count: float) -> str:
    """Bytes in the unit that suits them."""
    unit = 0
    while count >= 1024 and unit < len(_UNITS) - 1:
        count, unit = count / 1024, unit + 1
    return f"{count:.0f} {_UNITS[unit]}" if unit < 2 else f"{count:.1f} {_UNITS[unit]}"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, as in 1:02:03 or 0:45."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
