"""Live adapters of one decoder, by content digest, in the form that its layers read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lmesh_kernels.lora.factors import Adapter, Factors, content_digest
from lmesh_kernels.lora.sites import Site, SiteShape, sites
from lmesh_kernels.models.decoder import Decoder
from lmesh_kernels.ops.low_rank import LowRank, Part
from lmesh_kernels.ops.segmented_lora import ServedProduct
from lmesh_kernels.ops.segmented_plan import directory_of
from lmesh_kernels.ops.trained import value


class AdapterBankError(ValueError):
    """An adapter that cannot be held; `reason` is UPPER_SNAKE."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Resident:
    """One adapter on the decoder's device."""

    digest: str
    products: Mapping[str, ServedProduct]  # by the name of the fused product
    bytes: int
    rank: int  # the largest
    most_ranks: int  # of one product, its parts together
    directory: Tensor  # where all of it lies, for the Triton form


class AdapterBank:
    """Holds adapters up to a budget. Nothing that is held is ever moved or changed."""

    def __init__(self, decoder: Decoder, *, max_bytes: int) -> None:
        self._decoder, self._max_bytes = decoder, max_bytes
        self._residents: dict[str, Resident] = {}
        names = dict.fromkeys(shape.slot for shape in sites(decoder.config).values())
        self.numbers = {name: number for number, name in enumerate(names)}  # products, as directories have them

    def __len__(self) -> int:
        return len(self._residents)

    @property
    def used_bytes(self) -> int:
        """Of all that are held."""
        return sum(resident.bytes for resident in self._residents.values())

    def get(self, digest: str) -> Resident | None:
        """The adapter, if it is held."""
        return self._residents.get(digest)

    def prepare(self, digest: str, adapter: Adapter) -> Resident:
        """Checks and copies an adapter to the device, without holding it; may run beside steps, in another thread.

        Raises AdapterBankError ADAPTER_DIGEST_MISMATCH, ADAPTER_MISFIT (a site or shape that the model does not have)
        or ADAPTER_TOO_LARGE (alone beyond the whole budget).
        """
        found = content_digest(adapter)
        if found != digest:
            raise AdapterBankError("ADAPTER_DIGEST_MISMATCH", f"the files hold {found}, not {digest}")
        shapes = sites(self._decoder.config)
        _check(adapter, shapes)
        with torch.inference_mode():
            products = {slot: self._product(slot, members) for slot, members in _by_slot(adapter, shapes).items()}
        size = sum(_bytes(product) for product in products.values())
        if size > self._max_bytes:
            said = f"{size} bytes, and all adapters together have {self._max_bytes}"
            raise AdapterBankError("ADAPTER_TOO_LARGE", said)
        rank = max(factors.rank for factors in adapter.values())
        return Resident(
            digest=digest,
            products=products,
            bytes=size,
            rank=rank,
            most_ranks=max(value(product.low.a).shape[0] for product in products.values()),
            directory=self._directory(products),
        )

    def _directory(self, products: Mapping[str, ServedProduct]) -> Tensor:
        told = {name: (product.low, product.factors) for name, product in products.items()}
        return directory_of(told, self.numbers, self._decoder.arena.device)

    def hold(self, resident: Resident) -> None:
        """Makes it available. Raises AdapterBankError ADAPTER_BANK_FULL: something must be let go first."""
        if resident.digest in self._residents:
            return
        if self.used_bytes + resident.bytes > self._max_bytes:
            said = f"{resident.bytes} bytes more than the {self.used_bytes} held exceed {self._max_bytes}"
            raise AdapterBankError("ADAPTER_BANK_FULL", said)
        self._residents[resident.digest] = resident

    def drop(self, digest: str) -> Resident | None:
        """Lets it go, None of an unknown one. Steps read it by address: who drops it keeps it until they have run."""
        return self._residents.pop(digest, None)

    def _product(self, slot: str, members: Mapping[Site, tuple[SiteShape, Factors]]) -> ServedProduct:
        parts, factors, first = [], [], 0
        for shape, own in members.values():
            b = self._moved(own.b)
            parts.append(Part(site=0, start=shape.start, first=first, b=b, scale=own.scale))
            first += own.rank
            factors.append(self._factor(slot, shape, own))
        a = self._moved(torch.cat([own.a for _, own in members.values()]))
        return ServedProduct(low=LowRank(a=a, parts=tuple(parts)), factors=tuple(factors))

    def _moved(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._decoder.arena.device, self._decoder.dtype, copy=True).contiguous()

    def _factor(self, slot: str, shape: SiteShape, own: Factors) -> Tensor | None:
        if own.magnitude is None:
            return None
        device = self._decoder.arena.device
        rows = self._decoder.product(slot).matrix()[shape.start : shape.start + shape.outputs].float()
        added = own.scale * (own.b.to(device).float() @ own.a.to(device).float())
        norms = torch.linalg.vector_norm(rows + added, dim=1)
        factor: Tensor = own.magnitude.to(device).float() / norms
        return factor.to(self._decoder.dtype)


def _by_slot(adapter: Adapter, shapes: Mapping[Site, SiteShape]) -> dict[str, dict[Site, tuple[SiteShape, Factors]]]:
    found: dict[str, dict[Site, tuple[SiteShape, Factors]]] = {}
    for site, shape in shapes.items():
        if site in adapter:
            found.setdefault(shape.slot, {})[site] = (shape, adapter[site])
    return found


def _check(adapter: Adapter, shapes: Mapping[Site, SiteShape]) -> None:
    for site, own in adapter.items():
        shape = shapes.get(site)
        if shape is None:
            raise AdapterBankError("ADAPTER_MISFIT", f"the model has no {site.theirs}")
        due = ((own.rank, shape.inputs), (shape.outputs, own.rank))
        if (tuple(own.a.shape), tuple(own.b.shape)) != due:
            raise AdapterBankError("ADAPTER_MISFIT", f"{site.theirs} needs shapes {due}")


def _bytes(product: ServedProduct) -> int:
    tensors = [product.low.a, *(part.b for part in product.low.parts), *product.factors]
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))
