"""A request as the ledger holds it: what is needed to run it on, or to give it again."""

from __future__ import annotations

import json
import sys
import time
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from lmesh_chassis.errors import InternalError, ServiceError

from lmesh_gateway.generation import ChoiceEnd, ServedModel, Usage
from lmesh_gateway.plan import Plan, SequenceParams

PREFIX = "lmesh:"


def record_key(request_id: str) -> str:
    """The key of a request's record. Ids have no braces, so that no id's key is another one's choice."""
    return f"{PREFIX}out:{{{request_id}}}"


def choice_key(request_id: str, choice: int) -> str:
    """The key of a choice's ids."""
    return f"{record_key(request_id)}:{choice}"


def pack(ids: Sequence[int]) -> bytes:
    """Ids as little-endian uint32."""
    packed = array("I", ids)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def unpack(data: bytes) -> list[int]:
    """The ids of `pack`; an id that was cut is left out."""
    packed = array("I", data[: len(data) - len(data) % 4])
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tolist()


@dataclass(frozen=True, slots=True, kw_only=True)
class FailedEnd:
    """How a request ended that did not complete."""

    reason: str
    message: str

    @classmethod
    def of(cls, error: ServiceError) -> FailedEnd:
        """What was told to the client."""
        return cls(reason=error.reason, message=error.message)

    def error(self) -> ServiceError:
        """The same once more; metadata `ended` tells it from what is only so now."""
        known = next((kind for kind in _kinds(ServiceError) if kind.reason == self.reason), None)
        return (known or InternalError)(self.message, metadata={"ended": "true"})


def _kinds(of: type[ServiceError]) -> list[type[ServiceError]]:
    return [kind for direct in of.__subclasses__() for kind in (direct, *_kinds(direct))]


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What was read. `ids` and `ends` are by choice; `end` is None while it lives."""

    request_id: str
    nonce: str
    epoch: int
    gateway: str
    plan: Mapping[str, Any]  # as `plan_text` wrote it
    prompt_ids: tuple[int, ...]
    ids: list[list[int]]
    ends: list[ChoiceEnd | None]
    end: Usage | FailedEnd | None

    @property
    def tenant(self) -> str:
        """Whose it is."""
        return str(self.plan["tenant"])

    @property
    def model(self) -> str:
        """What the client asked for and is shown."""
        return str(self.plan["model"])

    @property
    def base(self) -> str:
        """The model's own id. Records from before there were adapters do not have it."""
        return str(self.plan.get("base", self.plan["model"]))

    @property
    def adapter(self) -> str:
        """Content digest of the adapter that it runs with, "" for none."""
        return str(self.plan.get("adapter", ""))

    def counts(self) -> list[int]:
        """Ids of each choice."""
        return [len(ids) for ids in self.ids]

    def restore(self, model: ServedModel, *, queue_timeout_s: float, cache_salt: str) -> Plan:
        """The plan, for this process's clock."""
        plan = self.plan
        now = time.monotonic()
        deadline_at = now + float(plan["deadline"]) - time.time()
        params = dict(plan["params"])
        params["stop_token_ids"] = tuple(params["stop_token_ids"])
        params["logit_bias"] = tuple((int(token), float(bias)) for token, bias in params.get("logit_bias", ()))
        return Plan(
            request_id=self.request_id,
            model=model,
            prompt_ids=self.prompt_ids,
            params=SequenceParams(**params),
            n=len(self.ids),
            stop=tuple(plan["stop"]),
            keep_special_tokens=bool(plan["keep_special_tokens"]),
            deadline_at=deadline_at,
            queue_deadline_at=min(deadline_at, now + queue_timeout_s),
            tenant=self.tenant,
            traceparent=str(plan["traceparent"]),
            created=float(plan["created"]),
            cache_salt=cache_salt,
            priority=int(plan["priority"]),
            detach_ttl_s=plan["detach_ttl_s"],
            sync=bool(plan["sync"]),
        )


def plan_text(plan: Plan) -> str:
    """A plan as the record holds it, without the prompt, which is kept packed."""
    return json.dumps(
        {
            "model": plan.model.id,
            "base": plan.model.base,
            "adapter": plan.model.adapter,
            "digest": plan.model.digest,
            "params": _fields(plan.params),
            "stop": plan.stop,
            "keep_special_tokens": plan.keep_special_tokens,
            "deadline": plan.deadline_at - time.monotonic() + time.time(),
            "tenant": plan.tenant,
            "traceparent": plan.traceparent,
            "created": plan.created,
            "priority": plan.priority,
            "detach_ttl_s": plan.detach_ttl_s,
            "sync": plan.sync,
        }
    )


def end_text(end: Usage | FailedEnd | ChoiceEnd) -> str:
    """An end as the record holds it."""
    return json.dumps(_fields(end))


def _fields(of: SequenceParams | Usage | FailedEnd | ChoiceEnd) -> dict[str, Any]:
    """By name, none of which holds others in turn: an `asdict` copies as deep as there might be, and takes 13 us."""
    return {field.name: getattr(of, field.name) for field in fields(of)}


def parse(request_id: str, fields: Mapping[bytes, bytes], ids: Sequence[bytes | None]) -> Record:
    """What was read. ValueError or KeyError when it is none of ours."""
    plan = json.loads(fields[b"plan"])
    n = int(fields[b"n"])
    ends = [json.loads(text) if (text := fields.get(b"end:%d" % i)) else None for i in range(n)]
    end = json.loads(fields[b"end"]) if b"end" in fields else None
    return Record(
        request_id=request_id,
        nonce=fields[b"nonce"].decode(),
        epoch=int(fields[b"epoch"]),
        gateway=fields[b"gateway"].decode(),
        plan=plan,
        prompt_ids=tuple(unpack(fields[b"prompt"])),
        ids=[unpack(data or b"") for data in ids[:n]],
        ends=[None if told is None else ChoiceEnd(**told) for told in ends],
        end=None if end is None else Usage(**end) if "prompt_tokens" in end else FailedEnd(**end),
    )
