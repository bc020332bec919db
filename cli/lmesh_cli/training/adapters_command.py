"""`lmesh adapters`: what is published."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from lmesh_cli.gateway import AddressOption, gateway_address
from lmesh_cli.training.adapter_name import AdapterName
from lmesh_cli.training.jobs_command import when
from lmesh_cli.training.records import Adapter
from lmesh_cli.training.training_link import TrainingLink
from lmesh_cli.training.transfers import TransferError, upload_folder

app = typer.Typer(help="Published adapters: list, publish, delete.", invoke_without_command=True)
_out, _notes = Console(), Console(stderr=True)
ModelOption = Annotated[str, typer.Option("--model", help="Id of the served model that it belongs to.")]


@app.callback()
def adapters(context: typer.Context, address: AddressOption = None) -> None:
    """List the adapters, every version; or do something with one."""
    if context.invoked_subcommand is None:
        _out.print(table(_link(address).adapters()))


@app.command()
def publish(
    name: str,
    job: Annotated[str, typer.Option(help="A completed job.")] = "",
    folder: Annotated[Path | None, typer.Option(help="A folder in PEFT's layout.")] = None,
    model: ModelOption = "",
    allow_recipe_mismatch: Annotated[
        bool,
        typer.Option("--allow-recipe-mismatch", help="Serve it on the same weights under another quantisation."),
    ] = False,
    address: AddressOption = None,
) -> None:
    """Make what a job made, or a folder, the newest version of a name."""
    if bool(job) == (folder is not None):
        raise TransferError("say either --job ID or --folder PATH")
    link = _link(address)
    artifact = upload_folder(link.address, folder, _notes) if folder is not None else ""
    made = link.publish(name, model=model, job_id=job, artifact=artifact, allow_recipe_mismatch=allow_recipe_mismatch)
    _out.print(f"published {made.id}", highlight=False, markup=False)


@app.command()
def delete(name: str, model: ModelOption = "", address: AddressOption = None) -> None:
    """Take NAME, all versions, or NAME@VERSION out of service; running requests end as they would have."""
    link = _link(address)
    asked = AdapterName.read(name, model)
    found = asked.pick(link.adapters(asked.model))
    link.delete(found.model, found.name, asked.version)
    _out.print(f"deleted {found.id if asked.version else f'{found.model}:{found.name}'}", highlight=False, markup=False)


def table(found: list[Adapter]) -> Table:
    """A line a version."""
    made = Table(box=SIMPLE)
    for heading in ("adapter", "rank", "workers", "job", "created"):
        made.add_column(heading, overflow="fold")
    for adapter in found:
        rank = "-" if adapter.rank is None else str(adapter.rank)
        made.add_row(adapter.id, rank, str(adapter.workers), adapter.job_id or "-", when(adapter.created))
    return made


def _link(address: str | None) -> TrainingLink:
    return TrainingLink(gateway_address(address))
