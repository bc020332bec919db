"""An adapter under training: its factors as parameters, laid out as the fused products read them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from lmesh_kernels.lora.factors import Adapter, Factors
from lmesh_kernels.lora.sites import Site, SiteShape, sites
from lmesh_kernels.models.config import ModelConfig
from lmesh_kernels.models.parameters import Parameters, Precision
from lmesh_kernels.ops.low_rank import LowRank, Part
from lmesh_kernels.ops.trained import Trained


class TrainableAdapter:
    """Factors of every site, in the form that `TrainingPass` takes.

    The a of the sites of one fused product lie one under the other in one parameter.
    """

    def __init__(
        self,
        adapter: Adapter,
        model: ModelConfig,
        *,
        precision: Precision,
        device: torch.device,
        beside: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Begins from `adapter`'s values. ValueError for sites that the model does not have.

        `beside`: slots of the decoder that are trained with it, by name; they become parameters as they are.
        """
        known = sites(model)
        if strange := [site.theirs for site in adapter if site not in known]:
            raise ValueError(f"sites that the model does not have: {strange[:3]}")
        self._numbers = {site: number for number, site in enumerate(known)}
        self._scales = {site: adapter[site].scale for site in adapter}
        self._products: dict[str, dict[Site, SiteShape]] = {}
        for site, shape in known.items():
            if site in adapter:
                self._products.setdefault(shape.slot, {})[site] = shape
        values: dict[str, Tensor] = {}
        for slot, members in self._products.items():
            values[f"{slot}.a"] = torch.cat([adapter[site].a for site in members])
            values |= {f"{site.theirs}.b": adapter[site].b for site in members}
            values |= {f"{s.theirs}.magnitude": m for s in members if (m := adapter[s].magnitude) is not None}
        moved = {name: t.detach().to(device, precision.dtype, copy=True) for name, t in values.items()}
        self.parameters = Parameters(moved | dict(beside or {}), precision)
        self.products = {slot: self._low_rank(slot) for slot in self._products}

    def _low_rank(self, slot: str) -> LowRank:
        parts, first = [], 0
        for site, shape in self._products[slot].items():
            b = self.parameters[f"{site.theirs}.b"].trained
            parts.append(
                Part(
                    site=self._numbers[site],
                    start=shape.start,
                    first=first,
                    b=b,
                    scale=self._scales[site],
                    magnitude=self._magnitude(site),
                )
            )
            first += b.value.shape[1]
        return LowRank(a=self.parameters[f"{slot}.a"].trained, parts=tuple(parts))

    def _magnitude(self, site: Site) -> Trained | None:
        name = f"{site.theirs}.magnitude"
        return self.parameters[name].trained if name in self.parameters else None

    def adapter(self) -> Adapter:
        """The factors now: views of the masters."""
        return dict(self._factors())

    def _factors(self) -> Iterator[tuple[Site, Factors]]:
        for slot, members in self._products.items():
            stacked, first = self.parameters[f"{slot}.a"].master, 0
            for site in members:
                b = self.parameters[f"{site.theirs}.b"].master
                a = stacked[first : first + b.shape[1]]
                first += b.shape[1]
                name = f"{site.theirs}.magnitude"
                magnitude = self.parameters[name].master if name in self.parameters else None
                yield site, Factors(a=a, b=b, scale=self._scales[site], magnitude=magnitude)
