"""The gateway's settings: LMESH_GATEWAY_* variables."""

from __future__ import annotations

from dataclasses import dataclass

from lmesh_chassis.settings import ChassisSettings, secret


@dataclass(frozen=True, kw_only=True, slots=True)
class GatewaySettings(ChassisSettings):
    """Settings of one gateway; `processes` copies of it share the two addresses."""

    grpc_address: str = "127.0.0.1:50051"
    http_address: str = "127.0.0.1:8000"
    scheduler: str = "127.0.0.1:50052"
    processes: int = 1
    max_body_bytes: int = 8 * 2**20  # largest request, gRPC message or HTTP body
    default_deadline_s: float = 600.0  # of a request whose client set none; also the longest that a client may set
    default_queue_timeout_s: float = 60.0  # longest wait for a worker unless the request says less
    tokenizer_threads: int = 2
    template_processes: int = 2
    template_timeout_s: float = 2.0
    max_requests: int = 4096  # live requests of one process; more are refused
    run_resume_grace_s: float = 5.0  # how long a broken Run link may take to come back before its worker counts as lost
    scheduler_grace_s: float = 10.0  # how long requests that wait for a worker survive without a scheduler
    redis_url: str = ""  # the token ledger's; empty: none is kept, and no request can be resumed at another gateway
    redis_timeout_s: float = 2.0
    ledger_ttl_s: float = 3600.0  # how long a request can be resumed after its last change
    ledger_max_entries: int = 4096  # requests that may wait to be written while Redis is away
    ledger_max_bytes: int = 64 * 2**20  # and their ids
    http_head_timeout_s: float = 10.0  # from a connection's start, or a request's, to the end of its headers
    drain_linger_s: float = 0.5  # after SIGTERM, how long new requests are still answered, with DRAINING
    artifacts: str = ""  # folder of the artifact store; empty: nothing can be uploaded or downloaded here
    max_upload_bytes: int = 4 * 2**30  # largest artifact
    upload_reserve_bytes: int = 256 * 2**20  # of the artifacts' disk, that uploads leave to checkpoints and adapters
    tenants_file: str = ""  # who may call, with which API keys; empty: everybody, with none
    # Keys the tenants' cache salts; the same in all gateways of a mesh. Empty: each model's digest.
    cache_salt_key: str = secret()
    reuse_port: bool = False  # other processes listen on the same addresses; set for the copies of `processes`

    def __post_init__(self) -> None:
        """Checks across fields; ValueError stops the boot."""
        if self.processes < 1 or self.tokenizer_threads < 1 or self.template_processes < 1:
            raise ValueError("processes, tokenizer_threads and template_processes must be at least 1")
        if self.redis_url and not self.redis_url.startswith(("redis://", "rediss://", "unix://")):
            raise ValueError(
                "redis_url must begin with redis://, rediss:// or unix://"
            )  # its value may hold a password
        if min(self.redis_timeout_s, self.ledger_ttl_s, self.ledger_max_entries, self.ledger_max_bytes) <= 0:
            raise ValueError("redis_timeout_s, ledger_ttl_s, ledger_max_entries and ledger_max_bytes must be positive")
        if self.http_head_timeout_s <= 0:
            raise ValueError("http_head_timeout_s must be positive")
        if self.max_upload_bytes <= 0 or self.upload_reserve_bytes < 0:
            raise ValueError("max_upload_bytes must be positive, upload_reserve_bytes 0 or more")
        if self.default_deadline_s <= 0 or self.default_queue_timeout_s <= 0 or self.max_requests < 1:
            raise ValueError("default_deadline_s, default_queue_timeout_s and max_requests must be positive")
