"""The gateway's model directory: what it says of models that are unknown, being loaded, or not usable."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from lmesh_gateway.errors import ModelLoadingError, ModelNotFoundError, ModelUnusableError
from lmesh_gateway.models import CatalogDirectory, CatalogModel


def model(model_id: str, source: str) -> CatalogModel:
    return CatalogModel(
        id=model_id,
        source=source,
        digest="d",
        text_digest=f"digest of {source}",
        max_model_len=8,
        vocab_size=10,
        workers=1,
        created=0.0,
    )


async def test_life_of_a_model_that_cannot_be_loaded(tmp_path: Path) -> None:
    directory = CatalogDirectory()
    assert not directory.settled  # nothing has been said yet
    with pytest.raises(ModelNotFoundError, match="served now: none"):
        directory.get("m")
    directory.feed([model("m", str(tmp_path))])
    assert not directory.settled
    with pytest.raises(ModelLoadingError):
        directory.get("m")
    async with asyncio.timeout(10):
        while not directory.settled:  # noqa: ASYNC110 - a property, to be asked
            await asyncio.sleep(0.001)
    with pytest.raises(ModelUnusableError, match=r"config\.json"):
        directory.get("m")
    assert directory.list() == []
    await directory.close()


async def test_a_newcomer_does_not_undo_readiness(tmp_path: Path) -> None:
    directory = CatalogDirectory()
    directory.feed([])
    assert directory.settled
    directory.feed([model("m", str(tmp_path))])
    assert directory.settled
    directory.feed([])
    with pytest.raises(ModelNotFoundError):
        directory.get("m")
    await directory.close()
