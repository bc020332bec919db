"""`lmesh jobs`: what trains and has trained."""

from __future__ import annotations

import json
from datetime import datetime

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from lmesh_cli.gateway import AddressOption, gateway_address
from lmesh_cli.training.progress import Course
from lmesh_cli.training.records import Job
from lmesh_cli.training.training_link import TrainingLink
from lmesh_cli.training.watching import say_how_to_follow
from lmesh_cli.training.watching import watch as watch_job

app = typer.Typer(help="Training jobs: list, show, watch, stop, cancel, resume.", invoke_without_command=True)
_out = Console()


@app.callback()
def jobs(context: typer.Context, address: AddressOption = None) -> None:
    """List the jobs, newest first; or do something with one."""
    if context.invoked_subcommand is None:
        _out.print(table(_link(address).jobs()))


@app.command()
def show(job_id: str, address: AddressOption = None) -> None:
    """Show one job: where it is, and its settings."""
    job = _link(address).get(job_id)
    for name, value in _lines(job).items():
        _out.print(f"{name:>10}  {value}", highlight=False, markup=False, soft_wrap=True)


@app.command()
def watch(job_id: str, address: AddressOption = None) -> None:
    """Watch a job to its end; exit status 1 when it failed or was cancelled. Ctrl-C stops the watching."""
    raise typer.Exit(watch_job(_link(address), job_id, _out))


@app.command()
def stop(job_id: str, address: AddressOption = None) -> None:
    """Save a checkpoint at the next step, and stop."""
    _link(address).stop(job_id)
    _out.print(f"asked; go on with it later: lmesh jobs resume {job_id}", highlight=False)


@app.command()
def cancel(job_id: str, address: AddressOption = None) -> None:
    """End a job without a checkpoint."""
    _link(address).cancel(job_id)
    _out.print("asked", highlight=False)


@app.command()
def resume(job_id: str, address: AddressOption = None) -> None:
    """Queue a stopped, cancelled or failed job again: it goes on from its last checkpoint."""
    job = _link(address).resume(job_id)
    _out.print(f"{job.id} is {job.state.value}", highlight=False)
    say_how_to_follow(job.id, _out)


def table(found: list[Job]) -> Table:
    """A line a job."""
    made = Table(box=SIMPLE)
    for heading in ("job", "state", "model", "method", "step", "loss", "publishes", "created"):
        made.add_column(heading, overflow="fold")
    for job in found:
        step = job.last_step
        made.add_row(
            job.id,
            job.state.value,
            job.model,
            job.method,
            "-" if step is None else str(step.number),
            "-" if step is None else f"{step.loss:.4f}",
            job.publish_as or "-",
            when(job.created),
        )
    return made


def when(time: datetime | None) -> str:
    """A time as a person reads it."""
    return "-" if time is None else f"{time:%Y-%m-%d %H:%M:%S}"


def _lines(job: Job) -> dict[str, str]:
    lines = {
        "job": job.id,
        "state": job.state.value,
        "reason": " ".join(part for part in (job.reason, job.message) if part),
        "created": when(job.created),
        "changed": when(job.changed),
        "trainer": f"{job.trainer} (attempt {job.attempts})" if job.trainer else "",
        "publishes": job.publish_as,
        "artifact": job.artifact,
        "adapter": job.adapter_digest,
    }
    if job.last_step is not None:
        course = Course()
        course.take(job.last_step)
        lines["step"] = f"{job.last_step.number}  {course.figures()}"
    lines["settings"] = json.dumps(dict(job.settings))
    return {name: value for name, value in lines.items() if value}


def _link(address: str | None) -> TrainingLink:
    return TrainingLink(gateway_address(address))
