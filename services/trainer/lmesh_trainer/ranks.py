"""What the first rank read, on every rank: the others may be on hosts that do not have its files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
import torch.distributed as dist
from lmesh_kernels.models.parameters import ranks
from torch import Tensor

from lmesh_trainer.checkpoint import Checkpoint, Progress
from lmesh_trainer.errors import JobError

Shape = tuple[tuple[int, ...], torch.dtype]


class Broadcast(Mapping[str, Tensor]):
    """Tensors of the first rank by name. Each is sent when it is asked for: all ranks ask for the same ones, in the
    same order, and none holds more than it keeps.
    """

    def __init__(self, shapes: Mapping[str, Shape], tensors: Mapping[str, Tensor] | None) -> None:
        self._shapes, self._tensors = shapes, tensors

    def __getitem__(self, name: str) -> Tensor:
        shape, dtype = self._shapes[name]
        tensor = torch.empty(shape, dtype=dtype) if self._tensors is None else self._tensors[name].contiguous()
        dist.broadcast(tensor, 0)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def least(number: int) -> int:
    """The smallest that a rank gives; every rank calls it."""
    if ranks() == 1:
        return number
    found = torch.tensor(number)
    dist.all_reduce(found, dist.ReduceOp.MIN)
    return int(found)


def is_lost(error: Exception) -> bool:
    """Whether an error says no more than that another rank is gone: its own says why."""
    words = ("gloo", "nccl", "connection", "rendezvous", "tcpstore")
    known = isinstance(error, dist.DistError) or type(error) is RuntimeError
    return known and any(word in str(error).lower() for word in words)


def from_first(read: Callable[[], Checkpoint | None]) -> Checkpoint | None:
    """What `read` gives on the first rank, on every rank; every rank calls it. Raises there what it raises here."""
    if ranks() == 1:
        return read()
    found: Checkpoint | None = None
    failed: JobError | None = None
    if dist.get_rank() == 0:
        try:
            found = read()
        except JobError as error:
            failed = error
    told: list[tuple[JobError | None, Progress | None, bytes, dict[str, Shape], dict[str, Shape]]] = [
        (
            failed,
            found.progress if found else None,
            found.cursor if found else b"",
            _shapes(found.parameters) if found else {},
            _shapes(found.optimiser) if found else {},
        )
    ]
    dist.broadcast_object_list(told, 0, device=torch.device("cpu"))
    failed, progress, cursor, parameters, optimiser = told[0]
    if failed is not None:
        raise failed
    if progress is None:
        return None
    return Checkpoint(
        progress=progress,
        parameters=Broadcast(parameters, found.parameters if found else None),
        optimiser=Broadcast(optimiser, found.optimiser if found else None),
        cursor=cursor,
    )


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, Shape]:
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
