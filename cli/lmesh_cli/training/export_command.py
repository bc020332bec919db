"""`lmesh export`: what was trained, as files of this machine."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lmesh_cli.gateway import AddressOption, gateway_address
from lmesh_cli.training.adapter_name import AdapterName
from lmesh_cli.training.report import size
from lmesh_cli.training.training_link import TrainingLink
from lmesh_cli.training.transfers import TransferError, download_folder, require_free


class ExportFormat(StrEnum):
    """What is written."""

    PEFT = "peft"
    MERGED = "merged"
    GGUF = "gguf"


def export(
    out: Annotated[Path, typer.Option(help="A folder that is new or empty.")],
    job: Annotated[str, typer.Option(help="A completed job.")] = "",
    adapter: Annotated[str, typer.Option(help="NAME, NAME@VERSION or MODEL:NAME@VERSION.")] = "",
    form: Annotated[
        ExportFormat, typer.Option("--format", help="The adapter, a merged model, or that as one GGUF file.")
    ] = ExportFormat.PEFT,
    dtype: Annotated[str, typer.Option(help="merged: bf16, f16 or float32; gguf: f16 or q8_0.")] = "",
    address: AddressOption = None,
) -> None:
    """Write an adapter, or its model with it merged, into a folder."""
    if bool(job) == bool(adapter):
        raise TransferError("say either --job ID or --adapter NAME")
    require_free(out)
    console, notes = Console(), Console(stderr=True)
    link = TrainingLink(gateway_address(address))
    digest = _digest(link, adapter) if adapter else ""
    with notes.status(f"writing {form.value}"):
        made = link.export(job_id=job, adapter_digest=digest, form=form.value, dtype=dtype)
    if form is not ExportFormat.PEFT:
        console.print(f"of the adapter's effect {made.survival:.2%} is in the written weights", highlight=False)
    for path in download_folder(link.address, made.artifact, out, notes):
        console.print(f"{path}  {size(path.stat().st_size)}", highlight=False, markup=False, soft_wrap=True)


def _digest(link: TrainingLink, text: str) -> str:
    asked = AdapterName.read(text)
    return asked.pick(link.adapters(asked.model)).digest
