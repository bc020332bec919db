"""Starts a worker: settings, model files, the engine process, then the server around it."""

from __future__ import annotations

import logging
import sys

from lmesh_chassis import lifecycle, logs, tls, tracing
from lmesh_chassis.lifecycle import Shutdown
from lmesh_chassis.settings import exit_unless, load_or_exit
from lmesh_kernels.text.digests import base_digest, dummy_digest, text_digest
from lmesh_kernels.text.resolve import ModelFiles, ModelNotFoundError, resolve

from lmesh_worker.config import WorkerSettings, model_id_of
from lmesh_worker.engine.config import EngineConfig
from lmesh_worker.engine_client import EngineClient
from lmesh_worker.worker import ModelIdentity, Worker

_log = logging.getLogger(__name__)


def main() -> None:
    """The process's entry; exits 0 after a drain, 1 when the engine failed, 2 on a bad setting or model."""
    settings = load_or_exit(WorkerSettings, service="worker")
    logs.setup("worker", settings.log_level)
    exit_unless(lambda: tls.from_settings(settings), service="worker")
    lifecycle.die_with_parent()
    try:
        files = resolve(settings.model, text_only=settings.load_format == "dummy")
    except ModelNotFoundError as error:
        _log.error("no such model", extra={"model": settings.model, "detail": str(error)})
        sys.exit(2)
    if settings.load_format == "dummy":
        if files.format == "gguf":
            _log.error("load_format dummy takes a folder with a config.json", extra={"model": settings.model})
            sys.exit(2)
        _log.warning("random weights are served (load_format dummy)", extra={"model": settings.model})
    model = _identity(settings, files)
    # Before any thread, exporter or gRPC: the engine must be the child of this thread and inherit nothing else.
    engine = EngineClient.spawn(model.source, engine_config(settings, model.digest))
    sys.exit(lifecycle.run(lambda shutdown: _serve(settings, model, engine, shutdown)))


async def _serve(settings: WorkerSettings, model: ModelIdentity, engine: EngineClient, shutdown: Shutdown) -> int:
    tracing.setup("worker", settings.otlp_endpoint)
    try:
        return await Worker(settings, model, engine).run(shutdown)
    finally:
        tracing.shutdown()


def _identity(settings: WorkerSettings, files: ModelFiles) -> ModelIdentity:
    digest_of = dummy_digest if settings.load_format == "dummy" else base_digest
    return ModelIdentity(
        model_id=settings.model_id or model_id_of(settings.model),
        source=files.source,
        digest=digest_of(files, nf4=settings.quantization == "nf4"),
        text_digest=text_digest(files),
    )


def engine_config(settings: WorkerSettings, digest: str) -> EngineConfig:
    """What the engine is told of the settings."""
    return EngineConfig(
        device=settings.device,
        dtype=settings.dtype,
        quantization=settings.quantization,
        load_format=settings.load_format,
        block_size=settings.block_size,
        kv_blocks=settings.kv_blocks,
        kv_cache_bytes=settings.kv_cache_bytes,
        memory_fraction=settings.memory_fraction,
        max_seqs=settings.max_seqs,
        max_step_tokens=settings.max_step_tokens,
        max_model_len=settings.max_model_len,
        prefix_cache=settings.prefix_cache,
        enforce_eager=settings.enforce_eager,
        batch_invariant=settings.batch_invariant,
        pipeline_depth=settings.pipeline_depth,
        threads=settings.threads,
        max_adapter_bytes=settings.max_adapter_bytes,
        model_digest=digest,
    )


if __name__ == "__main__":
    main()
