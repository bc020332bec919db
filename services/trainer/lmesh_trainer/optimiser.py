"""AdamW over a job's parameters: torch's fused one, or an 8-bit one from bitsandbytes where that runs."""

from __future__ import annotations

from collections.abc import Iterable
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
        self._parameters = list(parameters)
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
        """Everything that it remembers, by name: "<parameter>/<what>"."""
        return dict(self._named(self._parameters))

    def _named(self, parameters: Iterable[Parameter]) -> Iterable[tuple[str, torch.Tensor]]:
        for parameter in parameters:
            for what, tensor in self._adamw.state.get(parameter.master, {}).items():
                yield f"{parameter.name}/{what}", torch.as_tensor(tensor)

    @torch.no_grad()
    def load(self, state: dict[str, torch.Tensor]) -> None:
        """Takes what `state` gave. Raises JobError CHECKPOINT_MISMATCH when it is of other parameters."""
        known = {parameter.name: parameter for parameter in self._parameters}
        found: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in state.items():
            owner, _, what = name.rpartition("/")
            found.setdefault(owner, {})[what] = tensor
        if found and found.keys() != known.keys():
            strange = sorted(found.keys() ^ known.keys())[:3]
            raise JobError("CHECKPOINT_MISMATCH", f"the optimiser's state and the parameters differ: {strange}")
        for name, parts in found.items():
            master = known[name].master
            device = {"step": torch.device("cpu")} if master.device.type == "cpu" else {}
            self._adamw.state[master] = {w: t.to(device.get(w, master.device)).clone() for w, t in parts.items()}


def _eight_bit(groups: list[dict[str, Any]], options: dict[str, Any]) -> torch.optim.Optimizer:
    try:
        library: Any = import_module("bitsandbytes.optim")
    except ImportError as error:
        raise JobError("OPTIMISER_UNAVAILABLE", "optimiser adamw_8bit needs the package bitsandbytes") from error
    if not all(p.is_cuda for group in groups for p in group["params"]):
        raise JobError("OPTIMISER_UNAVAILABLE", "optimiser adamw_8bit runs on a CUDA device; take adamw")
    optimiser: torch.optim.Optimizer = library.AdamW8bit(groups, **options)
    return optimiser
