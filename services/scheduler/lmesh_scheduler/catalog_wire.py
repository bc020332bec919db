"""The catalog as it goes over the wire: the models that are served, each with its adapters."""

from __future__ import annotations

from google.protobuf.timestamp_pb2 import Timestamp
from lmesh.scheduler.v1 import model_pb2

from lmesh_scheduler.adapters.registry import AdapterRegistry
from lmesh_scheduler.fleet import CatalogEntry, Fleet


def catalog(fleet: Fleet, adapters: AdapterRegistry) -> model_pb2.ModelCatalog:
    """All models served now, with every version of their adapters that the served weights fit."""
    made = model_pb2.ModelCatalog()
    for entry in fleet.catalog():
        told = made.entries.add(model=descriptor(entry), workers=entry.workers, created=timestamp(entry.created))
        for one in adapters.of_model(entry.model.id, entry.model.digest):
            told.adapters.add(
                tenant=one.tenant,
                name=one.name,
                version=one.version,
                digest=one.digest,
                created=timestamp(one.created),
            )
    return made


def descriptor(entry: CatalogEntry) -> model_pb2.ModelDescriptor:
    """The wire form of a catalog entry's model."""
    model = entry.model
    return model_pb2.ModelDescriptor(
        id=model.id,
        source=model.source,
        digest=model.digest,
        text_digest=model.text_digest,
        max_model_len=model.max_model_len,
        vocab_size=model.vocab_size,
        block_size=model.block_size,
    )


def timestamp(seconds: float) -> Timestamp:
    """Unix seconds as a protobuf timestamp."""
    stamp = Timestamp()
    stamp.FromMicroseconds(round(seconds * 1e6))
    return stamp
