"""The gateway as a whole: its parts wired, served, and drained in the right order."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import Callable

from lmesh.inference.v1 import inference_pb2_grpc
from lmesh.training.v1 import training_pb2_grpc
from lmesh_chassis import lifecycle, metrics, tls
from lmesh_chassis.lifecycle import Shutdown
from lmesh_chassis.server import GrpcServer
from lmesh_kernels.text.sandbox import TemplateSandbox

from lmesh_gateway import training_servicer
from lmesh_gateway.artifact_transfer import ArtifactTransfer
from lmesh_gateway.authentication import Authenticator, interceptor
from lmesh_gateway.config import GatewaySettings
from lmesh_gateway.dispatch_link import DispatchLink
from lmesh_gateway.errors import DOMAIN
from lmesh_gateway.generation import Generator, ModelDirectory
from lmesh_gateway.generator import Limits, MeshGenerator
from lmesh_gateway.http.keys import KeyedApp
from lmesh_gateway.http_server import Asgi, HttpServer, bind
from lmesh_gateway.ledger import Ledger, LedgerLimits
from lmesh_gateway.models import CatalogDirectory
from lmesh_gateway.prompts import PromptBuilder
from lmesh_gateway.run_links import RunLinks
from lmesh_gateway.servicer import SERVICE_NAME, InferenceServicer
from lmesh_gateway.training_link import TrainingLink

_log = logging.getLogger(__name__)

_CUT_S = 0.5  # between the last word to a client and the end of its connection
_READY_POLL_S = 0.05
_JOIN_S = 5.0  # within which a process that shares its ports listens even if it cannot serve
# Builds the HTTP face over the core; `ready()` says whether the gateway can serve.
AppBuilder = Callable[[Generator, ModelDirectory, Callable[[], bool]], Asgi]


class Gateway:
    """One gateway process. `run` is its whole life."""

    def __init__(self, settings: GatewaySettings, build_app: AppBuilder) -> None:
        self._settings = settings
        self._build_app = build_app
        self.gateway_id = uuid.uuid4().hex
        self._tls = tls.from_settings(settings)
        self._authenticator = Authenticator.from_file(settings.tenants_file)
        self.directory = CatalogDirectory()
        self._dispatch = DispatchLink(
            settings.scheduler,
            self.gateway_id,
            grace_s=settings.scheduler_grace_s,
            on_catalog=self.directory.feed,
            tls=self._tls,
        )
        self._runs = RunLinks(
            self.gateway_id,
            grace_s=settings.run_resume_grace_s,
            on_worker_lost=self._dispatch.worker_lost,
            tls=self._tls,
        )
        self._ledger = Ledger(
            settings.redis_url,
            self.gateway_id,
            LedgerLimits(
                ttl_s=settings.ledger_ttl_s,
                max_entries=settings.ledger_max_entries,
                max_bytes=settings.ledger_max_bytes,
                timeout_s=settings.redis_timeout_s,
            ),
        )
        self._artifacts = ArtifactTransfer.from_folder(
            settings.artifacts, max_bytes=settings.max_upload_bytes, reserve_bytes=settings.upload_reserve_bytes
        )
        self._training_link = TrainingLink(
            settings.scheduler,
            deadline_s=settings.default_deadline_s,
            grace_s=settings.scheduler_grace_s,
            tls=self._tls,
        )
        self._training = training_servicer.TrainingServicer(self._training_link, self._artifacts, self.directory.shows)
        self._prompts = PromptBuilder(
            TemplateSandbox(processes=settings.template_processes, timeout_s=settings.template_timeout_s),
            threads=settings.tokenizer_threads,
        )
        self.generator = MeshGenerator(
            directory=self.directory,
            prompts=self._prompts,
            scheduler=self._dispatch,
            workers=self._runs,
            ledger=self._ledger,
            limits=Limits(
                deadline_s=settings.default_deadline_s,
                queue_timeout_s=settings.default_queue_timeout_s,
                max_requests=settings.max_requests,
            ),
            cache_salt_key=settings.cache_salt_key,
        )
        self._grpc = GrpcServer(
            settings.grpc_address,
            domain=DOMAIN,
            reuse_port=settings.reuse_port,
            reflection=settings.reflection,
            interceptors=[interceptor(self._authenticator)],
            max_message_bytes=settings.max_body_bytes,
            max_send_bytes=-1,  # a prompt's log-probabilities are as large as the client asked for
            tls=self._tls,
        )
        self._http: HttpServer | None = None
        self._page: metrics.MetricsServer | None = None

    @property
    def ready(self) -> bool:
        """Linked to the scheduler, every model of its catalog loaded or known to be unusable, and not draining."""
        return self._dispatch.connected and self.directory.settled and not self.generator.draining

    async def run(self, shutdown: Shutdown) -> int:
        """Serves until `shutdown`, then drains; the exit status."""
        await self.start(shutdown)
        watch = asyncio.create_task(self._watch())
        try:
            await shutdown.wait()
        finally:
            watch.cancel()
            await self.drain()
        return 0

    async def start(self, shutdown: Shutdown | None = None) -> None:
        """Links to the scheduler and listens on both addresses; OSError when an address is taken.

        One of several processes on the same ports listens once it can serve: until then the others answer, and a client
        whose connection it took would be told to try again.
        """
        settings = self._settings
        sock = bind(settings.http_address, reuse_port=settings.reuse_port)
        app = self._build_app(self.generator, self.directory, lambda: self.ready)
        self._http = HttpServer(
            KeyedApp(app, self._authenticator),
            sock,
            drain_timeout_s=settings.drain_timeout_s,
            head_timeout_s=settings.http_head_timeout_s,
            tls=self._tls.http,
        )
        servicer = InferenceServicer(self.generator, self.directory, self._dispatch)
        self._grpc.add(inference_pb2_grpc.add_InferenceServiceServicer_to_server, servicer, SERVICE_NAME)
        self._grpc.add(
            training_pb2_grpc.add_TrainingServiceServicer_to_server, self._training, training_servicer.SERVICE_NAME
        )
        self._ledger.start()
        self._dispatch.open()
        if settings.reuse_port:
            await self._can_serve(shutdown)
        await self._grpc.start()
        await self._http.start()
        if settings.metrics_port:
            self._page = await metrics.serve(
                settings.metrics_port, host=settings.metrics_host, healthy=lambda: self.ready
            )

    async def _can_serve(self, shutdown: Shutdown | None) -> None:
        """Waits until the gateway is ready, but not for ever: without a scheduler clients should be told of it."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_JOIN_S):
                while not self.ready and (shutdown is None or not shutdown.requested):  # noqa: ASYNC110 - a property
                    await asyncio.sleep(_READY_POLL_S)

    @property
    def ports(self) -> tuple[int, int]:
        """The bound (gRPC, HTTP) ports."""
        return self._grpc.port, self._http.port if self._http is not None else 0

    async def drain(self) -> None:
        """Not ready, nothing new; live streams end within the drain timeout; then the links say their last and end."""
        self.generator.draining = True
        self._grpc.set_all_serving(False)
        _log.info("draining", extra={"timeout_s": self._settings.drain_timeout_s})
        # A client that has not heard of it yet is told DRAINING, not cut off by a closing listener.
        await asyncio.sleep(self._settings.drain_linger_s)
        self._training.leave()
        # What has not ended by then is left to whoever resumes it; its clients are told so before they are cut off.
        told_s = max(0.8 * self._settings.drain_timeout_s, self._settings.drain_timeout_s - _CUT_S)
        leaving = asyncio.get_running_loop().call_later(told_s, self.generator.abandon)
        await asyncio.gather(self._grpc.drain(self._settings.drain_timeout_s), self._drain_http())
        leaving.cancel()
        self.generator.abandon()
        await self._training_link.close()
        if self._artifacts is not None:
            self._artifacts.close()
        await self._runs.close()
        await self._dispatch.close()
        await self._ledger.close()
        await self.directory.close()
        await self._prompts.close()
        if self._page is not None:
            await self._page.close()

    async def _drain_http(self) -> None:
        if self._http is not None:
            await self._http.drain()

    async def _watch(self) -> None:
        """Keeps health in step with readiness."""
        was_ready = False
        while True:
            if self.ready != was_ready:
                was_ready = self.ready
                self._grpc.set_all_serving(was_ready)
                if was_ready:
                    lifecycle.settle()
                    grpc_port, http_port = self.ports
                    _log.info("ready", extra={"grpc_port": grpc_port, "http_port": http_port})
                else:
                    _log.warning("not ready", extra={"linked": self._dispatch.connected})
            await asyncio.sleep(_READY_POLL_S)
