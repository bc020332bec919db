"""`lmesh train`: from a job file to a job that is watched to its end."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lmesh_cli.gateway import AddressOption, gateway_address
from lmesh_cli.training.job_file import JobFile, read_job
from lmesh_cli.training.report import show_report
from lmesh_cli.training.spec_link import job_spec
from lmesh_cli.training.training_link import TrainingLink
from lmesh_cli.training.transfers import upload_file
from lmesh_cli.training.watching import say_how_to_follow, watch


def train(
    config: Annotated[Path | None, typer.Option("--config", "-c", help="YAML of the job; flags go before it.")] = None,
    model: Annotated[str | None, typer.Option(help="A served model's id, hub:owner/name or a folder.")] = None,
    dataset: Annotated[str | None, typer.Option(help="A file, or hub:owner/name.")] = None,
    name: Annotated[str | None, typer.Option(help="Publish the adapter under this name.")] = None,
    epochs: Annotated[float | None, typer.Option()] = None,
    max_steps: Annotated[int | None, typer.Option(help="Updates; 0: as many as the epochs have.")] = None,
    learning_rate: Annotated[float | None, typer.Option()] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows an update.")] = None,
    rank: Annotated[int | None, typer.Option(help="The adapter's r.")] = None,
    load_in_4bit: Annotated[bool | None, typer.Option("--load-in-4bit/--no-load-in-4bit", help="QLoRA.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the dataset and the memory plan, and end.")] = False,
    detach: Annotated[bool, typer.Option("--detach", help="Do not watch it.")] = False,
    job_id: Annotated[str, typer.Option(help="The job's id; drawn when left out.")] = "",
    address: AddressOption = None,
) -> None:
    """Train a model on a dataset, and publish the adapter. Ctrl-C stops the watching, not the job."""
    flags = {
        "model": model,
        "dataset.source": dataset,
        "publish_as": name,
        "epochs": epochs,
        "max_steps": max_steps,
        "optimiser.learning_rate": learning_rate,
        "batch_size": batch_size,
        "lora.r": rank,
        "load_in_4bit": load_in_4bit,
    }
    job = read_job(config, flags)
    job_spec(job.values)  # before anything is uploaded
    out, notes = Console(), Console(stderr=True)
    link = TrainingLink(gateway_address(address))
    job = _uploaded(job, link, notes)
    with notes.status("reading the dataset and planning the memory"):
        dataset_report, plan = link.validate(job)
    show_report(dataset_report, plan, out)
    if dry_run:
        return
    made = link.create(job, job_id or f"{job.publish_as or 'job'}-{secrets.token_hex(4)}")
    out.print(f"job {made.id}", highlight=False)
    if detach:
        say_how_to_follow(made.id, out)
        return
    raise typer.Exit(watch(link, made.id, out))


def _uploaded(job: JobFile, link: TrainingLink, notes: Console) -> JobFile:
    """The job with its local dataset in the mesh's store."""
    if job.dataset is None:
        return job
    digest = upload_file(link.address, job.dataset, notes)
    source = f"artifact:{digest}/{job.dataset.name}"
    values = {**job.values, "dataset": {**job.values["dataset"], "source": source}}
    return JobFile(values=values, publish_as=job.publish_as, dataset=None)
