"""Starts a gateway: settings, then one serving process, or a parent that keeps several on the same ports."""

from __future__ import annotations

import logging
import os
import sys
import tempfile

from lmesh_chassis import lifecycle, logs, metrics, tls, tracing
from lmesh_chassis.lifecycle import Shutdown
from lmesh_chassis.processes import run_processes
from lmesh_chassis.settings import exit_unless, load_or_exit

from lmesh_gateway.artifact_transfer import ArtifactTransfer
from lmesh_gateway.authentication import Authenticator
from lmesh_gateway.config import GatewaySettings
from lmesh_gateway.gateway import Gateway
from lmesh_gateway.http.app import build_app
from lmesh_gateway.http_server import bind

_log = logging.getLogger(__name__)

_STOP_MARGIN_S = 5.0


def main() -> None:
    """The process's entry; exits 0 after a drain, 1 when it cannot listen, 2 on a bad setting or file of one."""
    settings = load_or_exit(GatewaySettings, service="gateway")
    logs.setup("gateway", settings.log_level)
    # Read again by each serving process; here so that a fault stops the boot with one line.
    exit_unless(lambda: tls.from_settings(settings), service="gateway")
    exit_unless(lambda: Authenticator.from_file(settings.tenants_file), service="gateway")
    exit_unless(
        lambda: ArtifactTransfer.from_folder(settings.artifacts, max_bytes=settings.max_upload_bytes), service="gateway"
    )
    serve = _serve if settings.processes == 1 else _supervise
    sys.exit(lifecycle.run(lambda shutdown: serve(settings, shutdown)))


async def _serve(settings: GatewaySettings, shutdown: Shutdown) -> int:
    tracing.setup("gateway", settings.otlp_endpoint)
    gateway = Gateway(
        settings,
        lambda generator, directory, ready: build_app(
            generator, directory, max_body_bytes=settings.max_body_bytes, ready=ready
        ),
    )
    try:
        return await gateway.run(shutdown)
    except OSError as error:
        _log.error("cannot serve", extra={"detail": str(error)})
        return 1
    finally:
        tracing.shutdown()


async def _supervise(settings: GatewaySettings, shutdown: Shutdown) -> int:
    """N copies of this process, each a peer of its own on the links; the kernel shares connections out."""
    try:
        for address in (settings.grpc_address, settings.http_address):
            # The copies share a port with anybody who asks to: that nobody else has it is found out here.
            bind(address, reuse_port=False).close()
    except OSError as error:
        _log.error("cannot serve", extra={"detail": str(error)})
        return 1
    with tempfile.TemporaryDirectory(prefix="lmesh-gateway-metrics-") as folder:
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder
        environment = {"LMESH_GATEWAY_PROCESSES": "1", "LMESH_GATEWAY_REUSE_PORT": "true"}
        page = None
        if settings.metrics_port:
            page = await metrics.serve(settings.metrics_port, host=settings.metrics_host)
            environment["LMESH_GATEWAY_METRICS_PORT"] = "0"
        try:
            return await run_processes(
                settings.processes,
                [sys.executable, "-P", "-m", "lmesh_gateway"],
                shutdown,
                environ=lambda index: environment,
                stop_timeout_s=settings.drain_timeout_s + _STOP_MARGIN_S,
                on_exit=metrics.forget_process,
            )
        finally:
            if page is not None:
                await page.close()


if __name__ == "__main__":
    main()
