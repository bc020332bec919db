"""The `lmesh` command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from lmesh_chassis.api_keys import digest_of, draw_key
from lmesh_chassis.artifacts.errors import ArtifactError
from rich.console import Console

from lmesh_cli import launch
from lmesh_cli import status as status_view
from lmesh_cli.access import AccessError
from lmesh_cli.chat import Chat, converse, pick_model
from lmesh_cli.gateway import AddressOption, gateway_address
from lmesh_cli.launch import LaunchError, UpRequest
from lmesh_cli.mesh_link import ChatOptions, MeshError
from lmesh_cli.plan import GRPC_PORT, HTTP_PORT, MeshPlan, PlanError
from lmesh_cli.ports import PortTakenError
from lmesh_cli.redis_server import RedisNotFoundError
from lmesh_cli.run_dir import AlreadyRunningError, MeshState, RunDir
from lmesh_cli.training import adapters_command, jobs_command
from lmesh_cli.training.adapter_name import AdapterNameError
from lmesh_cli.training.export_command import export
from lmesh_cli.training.job_file import JobFileError
from lmesh_cli.training.train_command import train
from lmesh_cli.training.transfers import TransferError

app = typer.Typer(
    help="Serves and trains language models in one gRPC mesh: gateway, scheduler, workers, trainers, Redis.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
_out = Console(soft_wrap=True)
_notes = Console(stderr=True)
_EXPECTED = (
    AccessError,
    AdapterNameError,
    AlreadyRunningError,
    ArtifactError,
    LaunchError,
    MeshError,
    PlanError,
    PortTakenError,
    RedisNotFoundError,
    TransferError,
)
_BAD_USAGE_STATUS = 2


@app.command()
def up(
    model: Annotated[
        list[str] | None,
        typer.Option(help="id=source, or source: a folder, a .gguf file, hub:owner/name, a short name. Repeatable."),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Workers of each model.")] = 1,
    trainers: Annotated[int, typer.Option(min=0, help="Trainer processes; 0 for a mesh that only serves.")] = 1,
    gateways: Annotated[int, typer.Option(min=1, help="Gateway processes on the same ports.")] = 1,
    http_port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the OpenAI API.")] = HTTP_PORT,
    grpc_port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the gRPC API.")] = GRPC_PORT,
    load_format: Annotated[
        str, typer.Option(help="auto: the models' weights; dummy: random ones, for measuring without a checkpoint.")
    ] = "auto",
    timeout: Annotated[float, typer.Option(help="Seconds that the start may take.")] = 600.0,
    foreground: Annotated[bool, typer.Option("--foreground", help="Supervise here until Ctrl-C.")] = False,
) -> None:
    """Start the mesh, detached, and return when it answers."""
    request = UpRequest(
        models=model or [],
        workers=workers,
        trainers=trainers,
        gateways=gateways,
        http_port=http_port,
        grpc_port=grpc_port,
        timeout_s=timeout,
        load_format=load_format,
    )
    if foreground:
        raise typer.Exit(launch.foreground(request, RunDir(), _out))
    _print_addresses(launch.up(request, RunDir(), _out))


@app.command()
def down(
    now: Annotated[bool, typer.Option("--now", help="Cut running requests instead of finishing them.")] = False,
) -> None:
    """Stop the mesh in order and return when no process of it is left."""
    stopped = launch.down(RunDir(), _out, now=now)
    _out.print("lmesh is down" if stopped else "lmesh was not up")


@app.command()
def status(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show workers, load, cache hits, queue and addresses; exit status 1 when the mesh is not up."""
    if as_json:
        known = status_view.collect(RunDir())
        print(json.dumps(known, indent=2))
        well = bool(known["up"])
    else:
        well = status_view.show(RunDir(), _out)
    raise typer.Exit(0 if well else 1)


@app.command()
def chat(
    model: Annotated[
        str | None, typer.Argument(help="Model id, or model:adapter; may be left out when one is served.")
    ] = None,
    message: Annotated[str | None, typer.Option("--message", "-m", help="Ask this and leave.")] = None,
    system: Annotated[str, typer.Option(help="System message.")] = "",
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.")] = None,
    top_p: Annotated[float | None, typer.Option()] = None,
    top_k: Annotated[int | None, typer.Option(min=0)] = None,
    seed: Annotated[int | None, typer.Option(min=0)] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Most tokens of an answer.")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds that an answer may take.")] = 600.0,
    address: AddressOption = None,
) -> None:
    """Talk to a model. Without -m: a conversation, or, when the input is no terminal, one question read from it."""
    target = gateway_address(address)
    options = ChatOptions(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed, max_tokens=max_tokens)
    talk = Chat(target, pick_model(target, model), options=options, system=system, timeout_s=timeout, notes=_notes)
    if message is None and sys.stdin.isatty():
        converse(talk, _notes, _reader())
    else:
        talk.ask(message if message is not None else sys.stdin.read())


@app.command()
def key() -> None:
    """Draw an API key: the key, shown this once, and what the tenants file holds of it."""
    drawn = draw_key()
    print(drawn)
    _notes.print("Keep it: only its digest is known to the mesh. In the tenants file:", style="dim", highlight=False)
    print(f'key_digests = ["{digest_of(drawn)}"]')


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(context: typer.Context) -> None:
    """Run the checkout's benchmarks/run.py with the given options."""
    script = Path(__file__).resolve().parents[2] / "benchmarks" / "run.py"
    if not script.is_file():
        raise LaunchError("benchmarks/run.py is part of a source checkout; this installation has none")
    raise typer.Exit(subprocess.run([sys.executable, str(script), *context.args], check=False).returncode)


app.command()(train)
app.command()(export)
app.add_typer(jobs_command.app, name="jobs")
app.add_typer(adapters_command.app, name="adapters")


def main() -> None:
    """Entry point: an expected failure is one clear message on stderr and exit status 1, or 2 for a job file's."""
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # its own lines would land in the middle of an answer
    try:
        app()
    except (*_EXPECTED, JobFileError) as error:
        _notes.print(f"lmesh: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        sys.exit(_BAD_USAGE_STATUS if isinstance(error, JobFileError) else 1)


def _reader() -> Callable[[str], str]:
    import readline  # noqa: F401 - importing it gives input() line editing and history

    return input


def _print_addresses(state: MeshState) -> None:
    plan = MeshPlan.from_json(state.plan)
    shape = plan.shape()
    models = ", ".join(f"{name} ({shape['workers']} worker{'s' * (shape['workers'] > 1)})" for name in shape["models"])
    _out.print(f"lmesh is up: {models}", highlight=False)
    url = f"{status_view.scheme()}://{plan.http_address}"
    _out.print(f"  OpenAI API  {url}/v1  (docs: {url}/docs)", highlight=False)
    _out.print(f"  gRPC        {plan.grpc_address}", highlight=False)
    _out.print(f"  Redis       {state.redis.get('version', 'your own')}", highlight=False)
    _out.print(f"  logs        {RunDir().logs}", highlight=False)


if __name__ == "__main__":
    main()
