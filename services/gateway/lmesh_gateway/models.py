"""The models that can be asked for: fed by the scheduler's catalog, each with its tokenizer loaded here."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from lmesh_chassis.backoff import Backoff
from lmesh_chassis.errors import ServiceError
from lmesh_kernels.text.digests import text_digest
from lmesh_kernels.text.generation import GenerationDefaults, load_generation_defaults
from lmesh_kernels.text.resolve import ModelNotFoundError as FilesNotFoundError
from lmesh_kernels.text.resolve import resolve
from lmesh_kernels.text.tokenizer import TextTokenizer, load_tokenizer

from lmesh_gateway.adapters import PublishedAdapter, PublishedAdapters
from lmesh_gateway.errors import ModelLoadingError, ModelNotFoundError, ModelUnusableError
from lmesh_gateway.generation import ServedModel

_log = logging.getLogger(__name__)

_MOST_NAMED = 20  # ids in an error's text: a status must fit into the trailers


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogModel:
    """A model as the scheduler announces it; see lmesh.scheduler.v1.ModelDescriptor. `created` is Unix seconds."""

    id: str
    source: str
    digest: str
    text_digest: str
    max_model_len: int
    vocab_size: int
    workers: int
    created: float
    adapters: tuple[PublishedAdapter, ...] = ()


@dataclass(frozen=True, slots=True)
class _Text:
    tokenizer: TextTokenizer
    defaults: GenerationDefaults
    longest_token_bytes: int


class CatalogDirectory:
    """Implements `generation.ModelDirectory`. Tokenizers are loaded in a thread, once for each text digest.

    An adapter goes by `model:name`, its newest version, or `model:name@version`; a model whose whole id is that wins.
    """

    def __init__(self) -> None:
        self._catalog: dict[str, CatalogModel] = {}
        self._adapters: dict[str, PublishedAdapters] = {}  # by model
        self._texts: dict[str, _Text] = {}
        self._faults: dict[str, str] = {}  # text digest -> why it cannot be used
        self._loads: dict[str, asyncio.Task[None]] = {}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="load-model")
        self._fed = False
        self._settled = False

    @property
    def settled(self) -> bool:
        """A catalog has come and every model in it was loaded or found unusable; later ones change nothing of it."""
        known = self._texts.keys() | self._faults.keys()
        self._settled = self._settled or (self._fed and all(m.text_digest in known for m in self._catalog.values()))
        return self._settled

    def feed(self, catalog: list[CatalogModel]) -> None:
        """Takes a new catalog, whole; begins to load what is new in it."""
        self._catalog = {model.id: model for model in catalog}
        self._adapters = {model.id: PublishedAdapters(model.adapters) for model in catalog}
        self._fed = True
        wanted = {model.text_digest for model in catalog}
        self._texts = {digest: text for digest, text in self._texts.items() if digest in wanted}
        for digest in self._loads.keys() - wanted:
            self._loads.pop(digest).cancel()
            self._faults.pop(digest, None)
        for model in catalog:
            if model.text_digest not in self._texts and model.text_digest not in self._loads:
                self._loads[model.text_digest] = asyncio.create_task(self._load(model))

    def list(self, tenant: str) -> list[ServedModel]:
        """The usable models, by id, each before the tenant's adapters of it, in their newest versions."""
        found = (self._served(entry, shown, adapter) for shown, entry, adapter in self._routes(tenant))
        return [model for model in found if model is not None]

    def get(self, model: str, tenant: str) -> ServedModel:
        """What the tenant means by that id; raises ModelNotFoundError, ModelLoadingError or ModelUnusableError."""
        if (entry := self._catalog.get(model)) is not None:
            return self._usable(entry, model)
        base, _, asked = model.rpartition(":")
        entry = self._catalog.get(base)
        adapter = None if entry is None else self._adapters[base].find(tenant, asked)
        if entry is None or adapter is None:
            self._check_fed()
            known = _named([shown for shown, _, _ in self._routes(tenant)])
            raise ModelNotFoundError(f"no worker serves {model!r}; served now: {known}", field="model")
        return self._usable(entry, model, adapter)

    def shows(self, model: str, tenant: str) -> bool:
        """Whether `get` would find it."""
        try:
            self.get(model, tenant)
        except ServiceError:
            return False
        return True

    def pinned(self, base: str, *, adapter: str, shown: str) -> ServedModel:
        """A model with the adapter of that content, whether or not it is published still; raises as `get`."""
        entry = self._catalog.get(base)
        if entry is None:
            self._check_fed()
            raise ModelNotFoundError(f"no worker serves {base!r} any more", field="model")
        return replace(self._usable(entry, shown), adapter=adapter)

    def _check_fed(self) -> None:
        """Before the first catalog nothing is known to be missing."""
        if not self._fed:
            said = "this gateway has yet to hear which models there are; try again"
            raise ModelLoadingError(said, retry_after_ms=1000)

    def _routes(self, tenant: str) -> Iterator[tuple[str, CatalogModel, PublishedAdapter | None]]:
        for _, entry in sorted(self._catalog.items()):
            yield entry.id, entry, None
            for adapter in self._adapters[entry.id].newest(tenant):
                shown = f"{entry.id}:{adapter.name}"
                if shown not in self._catalog:
                    yield shown, entry, adapter

    def _usable(self, entry: CatalogModel, shown: str, adapter: PublishedAdapter | None = None) -> ServedModel:
        if (served := self._served(entry, shown, adapter)) is not None:
            return served
        if (fault := self._faults.get(entry.text_digest)) is not None:
            raise ModelUnusableError(f"{shown} cannot be used through this gateway: {fault}", field="model")
        raise ModelLoadingError(f"the tokenizer of {shown} is being loaded; try again", retry_after_ms=1000)

    def _served(self, entry: CatalogModel, shown: str, adapter: PublishedAdapter | None) -> ServedModel | None:
        text = self._texts.get(entry.text_digest)
        if text is None:
            return None
        return ServedModel(
            id=shown,
            base=entry.id,
            adapter="" if adapter is None else adapter.digest,
            digest=entry.digest,
            max_model_len=entry.max_model_len,
            vocab_size=entry.vocab_size or text.tokenizer.vocab_size,
            created=entry.created if adapter is None else adapter.created,
            workers=entry.workers,
            tokenizer=text.tokenizer,
            defaults=text.defaults,
            longest_token_bytes=text.longest_token_bytes,
        )

    async def _load(self, model: CatalogModel) -> None:
        """Loads until it works: a hub out of reach or files that are not there yet mend themselves."""
        backoff = Backoff(first_s=1.0, most_s=30.0)
        loop = asyncio.get_running_loop()
        while True:
            try:
                self._texts[model.text_digest] = await loop.run_in_executor(self._pool, _load_text, model)
                break
            except (FilesNotFoundError, OSError, ValueError) as error:
                self._faults[model.text_digest] = str(error)
                extra = {"model": model.id, "source": model.source, "detail": str(error)}
                _log.error("model cannot be used", extra=extra)
                await asyncio.sleep(backoff.next_s())
        self._faults.pop(model.text_digest, None)
        self._loads.pop(model.text_digest, None)
        _log.info("model usable", extra={"model": model.id, "source": model.source})

    async def close(self) -> None:
        """Stops loading."""
        for task in self._loads.values():
            task.cancel()
        await asyncio.gather(*self._loads.values(), return_exceptions=True)
        self._pool.shutdown(wait=False, cancel_futures=True)


def _named(ids: Sequence[str]) -> str:
    more = f" and {len(ids) - _MOST_NAMED} more" if len(ids) > _MOST_NAMED else ""
    return (", ".join(ids[:_MOST_NAMED]) or "none") + more


def _load_text(model: CatalogModel) -> _Text:
    """Runs in a thread. ValueError when the files here are not those of the workers."""
    files = resolve(model.source, text_only=True)
    found = text_digest(files)
    if found != model.text_digest:
        raise ValueError(
            f"tokenizer and chat template of {model.source} have digest {found[:12]} here and "
            f"{model.text_digest[:12]} at the workers; give both the same files"
        )
    tokenizer = load_tokenizer(files)
    longest = max(len(tokenizer.token_bytes(token)) for token in range(tokenizer.vocab_size))
    return _Text(tokenizer, load_generation_defaults(files), longest)
