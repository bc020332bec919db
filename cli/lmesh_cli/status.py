"""`lmesh status`: what runs, where, and how busy it is; as a table or as JSON."""

from __future__ import annotations

import dataclasses
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from lmesh_cli import access, mesh_link
from lmesh_cli.mesh_link import FleetView, MeshError, WorkerView
from lmesh_cli.plan import MeshPlan
from lmesh_cli.run_dir import MeshState, RunDir


def scheme() -> str:
    """Of the HTTP address: https where the command has a CA to check the mesh with."""
    return "http" if access.http_context() is None else "https"


def addresses(state: MeshState) -> dict[str, str]:
    """Where the mesh is reached, by purpose."""
    plan = MeshPlan.from_json(state.plan)
    return {
        "http": f"{scheme()}://{plan.http_address}",
        "grpc": plan.grpc_address,
        "scheduler": plan.scheduler_address,
        "scheduler_metrics": f"http://127.0.0.1:{plan.scheduler_metrics_port}/metrics",
        **{f"{w.id}_metrics": f"http://127.0.0.1:{w.metrics_port}/metrics" for w in plan.workers},
        **{f"{t.id}_metrics": f"http://127.0.0.1:{t.metrics_port}/metrics" for t in plan.trainers},
    }


def collect(run_dir: RunDir) -> dict[str, Any]:
    """Everything that is known, ready for JSON; `up` is False when no supervisor lives."""
    state = run_dir.live()
    if state is None:
        return {"up": False, "run_dir": str(run_dir.path), "workers": []}
    fleet, error = _fleet(state)
    known: dict[str, Any] = {} if fleet is None else dataclasses.asdict(fleet)
    return {
        "up": state.phase in ("ready", "degraded"),
        "phase": state.phase,
        "error": error,
        "run_dir": str(run_dir.path),
        "addresses": addresses(state),
        "redis": state.redis,
        "supervisor": state.pid,
        "services": [dataclasses.asdict(service) for service in state.services],
        "workers": [],
        **known,
    }


def show(run_dir: RunDir, console: Console) -> bool:
    """Prints the tables; False when the mesh is not up."""
    state = run_dir.live()
    if state is None:
        console.print(f"lmesh is not up (run folder {run_dir.path}); start it with `lmesh up`")
        return False
    fleet, error = _fleet(state)
    console.print(f"lmesh is [bold]{state.phase}[/bold], supervisor pid {state.pid}, logs in {run_dir.logs}")
    console.print(_services(state))
    if fleet is None:
        console.print(f"[red]the scheduler does not answer:[/red] {error}")
    else:
        console.print(_workers(fleet))
        for worker in fleet.workers:
            console.print(f"{worker.id}: {worker.model} on {worker.device}", highlight=False)
        journal = "ok" if fleet.journal_ok else "[red]not answering[/red]"
        console.print(
            f"queued {fleet.queued}, live {fleet.live}, gateways {fleet.gateways}, "
            f"redis {state.redis.get('version', 'of your own')}, journal {journal}"
        )
    console.print("\n".join(f"{name:>18}  {address}" for name, address in addresses(state).items()), highlight=False)
    return state.phase in ("ready", "degraded")


def _fleet(state: MeshState) -> tuple[FleetView | None, str]:
    try:
        return mesh_link.describe_fleet(MeshPlan.from_json(state.plan).scheduler_address), ""
    except MeshError as error:
        return None, str(error)


def _services(state: MeshState) -> Table:
    table = Table("service", "state", "pid", "restarts", "note", box=SIMPLE)
    for service in state.services:
        note = service.message and f"{service.message}; see {service.log}"
        table.add_row(service.name, service.state, str(service.pid), str(service.restarts), note)
    return table


def _workers(fleet: FleetView) -> Table:
    table = Table(box=SIMPLE)
    for heading in ("worker", "state", "run", "wait", "kv blocks", "cache hits", "tokens out"):
        table.add_column(heading, no_wrap=True)
    for worker in fleet.workers:
        table.add_row(*_cells(worker))
    return table


def _cells(worker: WorkerView) -> tuple[str, ...]:
    hits = "-" if worker.cache_hit_rate is None else f"{worker.cache_hit_rate:.0%}"
    return (
        worker.id,
        worker.state,
        str(worker.running),
        str(worker.waiting),
        f"{worker.kv_blocks_used}/{worker.kv_blocks}",
        hits,
        str(worker.generated_tokens),
    )
