"""Watching a job to its end."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console

from lmesh_cli.mesh_link import MeshError
from lmesh_cli.training.progress import display
from lmesh_cli.training.records import Adapter, JobState, Made, Published, StateChanged
from lmesh_cli.training.training_link import TrainingLink

DETACHED_STATUS = 130  # as a shell has it for Ctrl-C


@dataclass(kw_only=True, slots=True)
class Ending:
    """How it came out."""

    last: StateChanged | None = None
    made: Made | None = None
    published: Adapter | None = None


def watch(link: TrainingLink, job_id: str, out: Console) -> int:
    """Shows a job's events until it has ended; the command's exit status. Ctrl-C only stops the watching."""
    ending, shown = Ending(), display(out)
    try:
        for event in link.watch(job_id):
            shown.show(event)
            if isinstance(event, StateChanged):
                ending.last = event
            elif isinstance(event, Made):
                ending.made = event
            elif isinstance(event, Published):
                ending.published = event.adapter
    except KeyboardInterrupt:
        shown.close()
        _say_detached(job_id, out)
        return DETACHED_STATUS
    except MeshError as error:
        shown.close()
        if error.lost:
            _say_detached(job_id, out)
        raise
    finally:
        shown.close()
    return _conclude(job_id, ending, out)


def _conclude(job_id: str, ending: Ending, out: Console) -> int:
    last = ending.last
    state = JobState.UNKNOWN if last is None else last.state
    if state is JobState.COMPLETED:
        _say_what_next(job_id, ending, out)
    else:
        out.print(f"go on with it: lmesh jobs resume {job_id}", highlight=False)
    return 0 if state.well else 1


def _say_what_next(job_id: str, ending: Ending, out: Console) -> None:
    export, published = f"files of it: lmesh export --job {job_id}", ending.published
    if ending.made is not None and not ending.made.adapter_digest:
        lines = [f"{export} --format merged --out FOLDER", "serve it: lmesh up --model NAME=FOLDER"]
    elif published is None:
        lines = [f"serve it: lmesh adapters publish NAME --job {job_id}", f"{export} --out FOLDER"]
    else:
        talk = f'talk to it: lmesh chat {published.model}:{published.name} -m "..."'
        lines = [talk, f"{export} --out FOLDER"]
    for line in lines:
        out.print(line, highlight=False, markup=False, soft_wrap=True)


def _say_detached(job_id: str, out: Console) -> None:
    out.print(f"the job goes on: {job_id}", highlight=False)
    say_how_to_follow(job_id, out)


def say_how_to_follow(job_id: str, out: Console) -> None:
    """What can be done with a job that runs."""
    out.print(f"  lmesh jobs watch {job_id}", highlight=False)
    out.print(f"  lmesh jobs stop {job_id}     saves a checkpoint and stops", highlight=False)
    out.print(f"  lmesh jobs cancel {job_id}   ends it at once", highlight=False)
