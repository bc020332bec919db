"""The gateway's model directory: what it says of models that are unknown, being loaded, or not usable."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from lmesh_gateway import models
from lmesh_gateway.adapters import PublishedAdapter, PublishedAdapters
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
    with pytest.raises(ModelLoadingError, match="has yet to hear"):
        directory.get("m", "")
    with pytest.raises(ModelLoadingError, match="has yet to hear"):
        directory.pinned("m", adapter="", shown="m")  # of a request that a new gateway takes over
    assert not directory.shows("m", "")
    directory.feed([])
    with pytest.raises(ModelNotFoundError, match="served now: none"):
        directory.get("m", "")
    await directory.close()
    directory = CatalogDirectory()
    directory.feed([model("m", str(tmp_path))])
    assert not directory.settled
    with pytest.raises(ModelLoadingError):
        directory.get("m", "")
    async with asyncio.timeout(10):
        while not directory.settled:  # noqa: ASYNC110 - a property, to be asked
            await asyncio.sleep(0.001)
    with pytest.raises(ModelUnusableError, match=r"config\.json"):
        directory.get("m", "")
    assert directory.list("") == []
    await directory.close()


async def test_a_newcomer_does_not_undo_readiness(tmp_path: Path) -> None:
    directory = CatalogDirectory()
    directory.feed([])
    assert directory.settled
    directory.feed([model("m", str(tmp_path))])
    assert directory.settled
    directory.feed([])
    with pytest.raises(ModelNotFoundError):
        directory.get("m", "")
    await directory.close()


def adapter(tenant: str, name: str, version: int) -> PublishedAdapter:
    return PublishedAdapter(tenant=tenant, name=name, version=version, digest=f"{name}{version}", created=0.0)


def test_which_adapter_a_name_asks_for() -> None:
    published = PublishedAdapters(
        [adapter("a", "x", 2), adapter("a", "x", 10), adapter("a", "w.1-_", 1), adapter("b", "x", 11)]
    )
    assert [one.digest for one in published.newest("a")] == ["w.1-_1", "x10"]
    assert published.newest("c") == []
    found = {asked: published.find("a", asked) for asked in ("x", "x@2", "x@10", "x@11", "x@1", "y", "x@02", "x@", "")}
    told = {asked: one.digest for asked, one in found.items() if one is not None}
    assert told == {"x": "x10", "x@2": "x2", "x@10": "x10"}
    assert published.find("a", "x@" + "9" * 5000) is None


async def test_a_model_whose_id_has_a_colon(monkeypatch: pytest.MonkeyPatch) -> None:
    """It wins over an adapter of that name, and has adapters of its own."""
    text = SimpleNamespace(tokenizer=SimpleNamespace(vocab_size=10), defaults=None, longest_token_bytes=4)
    monkeypatch.setattr(models, "_load_text", lambda model: text)
    directory = CatalogDirectory()
    base = replace(model("m", "s"), adapters=(adapter("", "7b", 1), adapter("", "ada", 1)))
    directory.feed([base, replace(model("m:7b", "s"), adapters=(adapter("", "eve", 3),))])
    async with asyncio.timeout(10):
        while not directory.settled:  # noqa: ASYNC110 - a property, to be asked
            await asyncio.sleep(0.001)
    assert [m.id for m in directory.list("")] == ["m", "m:ada", "m:7b", "m:7b:eve"]
    for asked, due in {
        "m": ("m", ""),
        "m:7b": ("m:7b", ""),
        "m:7b:eve": ("m:7b", "eve3"),
        "m:ada": ("m", "ada1"),
    }.items():
        got = directory.get(asked, "")
        assert (got.id, got.base, got.adapter) == (asked, *due)
    pinned = directory.pinned("m", adapter="gone", shown="m:old")
    assert (pinned.id, pinned.base, pinned.adapter) == ("m:old", "m", "gone")
    with pytest.raises(ModelNotFoundError):
        directory.pinned("q", adapter="", shown="q")
    await directory.close()


async def test_a_long_catalog_is_not_named_whole(tmp_path: Path) -> None:
    directory = CatalogDirectory()
    adapters = tuple(adapter("", f"a{number:03}", 1) for number in range(99))
    directory.feed([replace(model("m", str(tmp_path)), adapters=adapters)])
    with pytest.raises(ModelNotFoundError, match=r"served now: m, m:a000, .*m:a018 and 80 more$"):
        directory.get("q", "")
    await directory.close()
