"""The worker's settings, read from LMESH_WORKER_* (see lmesh_chassis.settings)."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import Literal

from lmesh_chassis.settings import ChassisSettings


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerSettings(ChassisSettings):
    """One model on one device. Zeros mean: planned from the model and the device."""

    address: str = "127.0.0.1:0"  # where the Run service listens
    advertise: str = ""  # host:port that gateways reach it by; empty: derived from `address`
    scheduler: str = "127.0.0.1:50052"
    id: str = ""  # stable name; empty: host name and port
    model: str  # a source that lmesh_kernels.text.resolve knows
    model_id: str = ""  # what clients ask for; empty: derived from `model`

    device: Literal["auto", "cpu", "cuda", "rocm", "xpu"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantization: Literal["auto", "none", "nf4"] = "auto"  # auto: as the checkpoint is
    load_format: Literal["auto", "dummy"] = "auto"  # dummy: random weights; the model may be a folder without any
    max_seqs: int = 0
    max_step_tokens: int = 0
    block_size: int = 0
    kv_blocks: int = 0
    kv_cache_bytes: int = 0
    memory_fraction: float = 0.0  # of the free memory, for weights, activations and KV together
    max_model_len: int = 0
    prefix_cache: bool = True
    artifacts: str = ""  # folder of the artifact store, which adapters are fetched from; empty: none are served
    max_adapter_bytes: int = 0  # held adapters, at most
    enforce_eager: bool = False  # no captured graphs
    batch_invariant: bool = False  # a request's ids do not depend on what else runs, in 16 bits on a CUDA device
    pipeline_depth: int = -1  # 0 or 1; -1: the platform chooses
    threads: int = 0

    run_grace_s: float = 10.0  # how long a gateway whose stream broke may come back to its sequences
    max_unacked_steps: int = 16384  # a gateway further behind than this is dropped as too slow
    max_unacked_bytes: int = 64 * 2**20
    max_engine_backlog_bytes: int = 64 * 2**20  # starts that wait for an engine that does not read; beyond, aborted
    step_bound_s: float = 60.0  # work waits and no step was committed for this long: stuck
    compile_bound_s: float = 900.0  # the same while the engine says that it compiles
    engine_start_timeout_s: float = 900.0
    # After draining was announced, how long starts of placements made just before may still come in.
    drain_linger_s: float = 0.5

    def __post_init__(self) -> None:
        for name in (
            "block_size",
            "max_seqs",
            "max_step_tokens",
            "kv_blocks",
            "kv_cache_bytes",
            "max_model_len",
            "threads",
            "max_adapter_bytes",
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 (planned) or more")
        for name in ("max_unacked_steps", "max_unacked_bytes", "max_engine_backlog_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")
        if self.pipeline_depth not in (-1, 0, 1):
            raise ValueError("pipeline_depth must be 0, 1 or -1 (the platform chooses)")
        if not 0 <= self.memory_fraction <= 1:
            raise ValueError("memory_fraction must lie in [0, 1]")
        if self.run_grace_s <= 0 or self.step_bound_s <= 0 or self.compile_bound_s <= 0:
            raise ValueError("run_grace_s, step_bound_s and compile_bound_s must be positive")


def model_id_of(source: str) -> str:
    """The name that clients ask for, from a source: its last part without revision or .gguf, in lower case."""
    name = source.split(":", 1)[-1].rstrip("/").rsplit("/", 1)[-1].split("@", 1)[0]
    return name.removesuffix(".gguf").lower()


def advertised_address(listen: str, port: int, scheduler: str) -> str:
    """host:port under which others reach a listener: its own host, or, for a wildcard, the one facing the scheduler."""
    host = listen.rsplit(":", 1)[0]
    if host in ("0.0.0.0", "[::]", "::", "*", ""):
        host = _host_facing(scheduler)
    return f"{host}:{port}"


def _host_facing(target: str) -> str:
    host, _, port = target.rpartition(":")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, int(port), type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)  # sends nothing: it only asks for a route
            own = str(probe.getsockname()[0])
            return f"[{own}]" if family == socket.AF_INET6 else own
    except (OSError, ValueError):
        return socket.gethostname()
