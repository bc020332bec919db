"""AdamW over a job's parameters: torch's fused one, or an 8-bit one from bitsandbytes where that runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from lmesh_kernels.models.parameters import Parameter, Parameters

from lmesh_trainer.errors import JobError


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamW:
    """Loshchilov and Hutter 2019, arXiv 1711.05101; names as torch has them."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    eight_bit: bool = False


class Optimiser:
    """Changes masters by their gradients. Matrices decay; norms, biases and magnitudes do not."""

    def __init__(self, parameters: Parameters, settings: AdamW) -> None:
        """Raises JobError OPTIMISER_UNAVAILABLE for an 8-bit one without bitsandbytes or without a GPU."""
        self._all, self._parameters = parameters, list(parameters)
        groups = [
            {"params": [p.master for p in members], "weight_decay": decay}
            for members, decay in (
                ([p for p in self._parameters if p.decays], settings.weight_decay),
                ([p for p in self._parameters if not p.decays], 0.0),
            )
            if members
        ]
        options: dict[str, Any] = {"lr": 0.0, "betas": settings.betas, "eps": settings.eps}
        self._adamw: torch.optim.Optimizer = (
            _eight_bit(groups, options) if settings.eight_bit else torch.optim.AdamW(groups, fused=True, **options)
        )

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """One update at a learning rate, from the gradient sums as they are now."""
        for group in self._adamw.param_groups:
            group["lr"] = rate
        for parameter in self._parameters:
            grad = parameter.trained.grad
            parameter.master.grad = grad if grad.dtype == parameter.master.dtype else grad.to(parameter.master.dtype)
        self._adamw.step()
        for parameter in self._parameters:
            parameter.master.grad = None

    def state(self) -> dict[str, torch.Tensor]:
        """Everything that it remembers, by name: "<parameter>/<what>", whole on the first rank; every rank calls it."""
        return dict(self._named(self._parameters))

    def _named(self, parameters: Iterable[Parameter]) -> Iterable[tuple[str, torch.Tensor]]:
        for parameter in parameters:
            for what, tensor in self._adamw.state.get(parameter.master, {}).items():
                found = torch.as_tensor(tensor)
                if found.shape == parameter.master.shape:
                    found = self._all.gathered(parameter.name, found)
                yield f"{parameter.name}/{what}", found

    @torch.no_grad()
    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Takes what `state` gave; every rank calls it. Raises JobError CHECKPOINT_MISMATCH for other parameters'."""
        known = {parameter.name: parameter for parameter in self._parameters}
        found: dict[str, list[str]] = {}
        for name in state:
            owner, _, what = name.rpartition("/")
            found.setdefault(owner, []).append(what)
        if found and found.keys() != known.keys():
            strange = sorted(found.keys() ^ known.keys())[:3]
            raise JobError("CHECKPOINT_MISMATCH", f"the optimiser's state and the parameters differ: {strange}")
        for name, parts in found.items():
            master = known[name].master
            self._adamw.state[master] = {w: self._own(known[name], w, state[f"{name}/{w}"]) for w in parts}

    def _own(self, parameter: Parameter, what: str, tensor: torch.Tensor) -> torch.Tensor:
        """This rank's part, where the library keeps it."""
        device = parameter.master.device
        found = self._all.part(parameter.name, tensor) if tensor.dim() else tensor
        return found.to("cpu" if what == "step" and device.type == "cpu" else device).clone()


def _eight_bit(groups: list[dict[str, Any]], options: dict[str, Any]) -> torch.optim.Optimizer:
    try:
        library: Any = import_module("bitsandbytes.optim")
    except ImportError as error:
        raise JobError("OPTIMISER_UNAVAILABLE", "optimiser adamw_8bit needs the package bitsandbytes") from error
    if not all(p.is_cuda for group in groups for p in group["params"]):
        raise JobError("OPTIMISER_UNAVAILABLE", "optimiser adamw_8bit runs on a CUDA device; take adamw")
    optimiser: torch.optim.Optimizer = library.AdamW8bit(groups, **options)
    return optimiser
