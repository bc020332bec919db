"""Where the gateway is that a command talks to."""

from __future__ import annotations

from typing import Annotated

import typer

from lmesh_cli.plan import GRPC_PORT, MeshPlan
from lmesh_cli.ports import HOST
from lmesh_cli.run_dir import RunDir

AddressOption = Annotated[str | None, typer.Option("--address", help="host:port of a gateway's gRPC API.")]


def gateway_address(asked: str | None) -> str:
    """`asked`, or the local mesh's, or where one would be."""
    if asked:
        return asked
    state = RunDir().live()
    return f"{HOST}:{GRPC_PORT}" if state is None else MeshPlan.from_json(state.plan).grpc_address
