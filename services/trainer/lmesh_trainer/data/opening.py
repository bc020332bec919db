"""A job's rows, held whole or streamed as its settings say."""

from __future__ import annotations

from lmesh_kernels.text.tokenizer import TextTokenizer

from lmesh_trainer.data.dataset import load_dataset, row_settings
from lmesh_trainer.data.feed import Feed
from lmesh_trainer.data.source import open_source
from lmesh_trainer.data.streamed_feed import StreamedFeed
from lmesh_trainer.data.whole_feed import WholeFeed
from lmesh_trainer.spec import JobSpec


def open_feed(spec: JobSpec, tokenizer: TextTokenizer, *, context: int) -> Feed:
    """Reads all rows, or the first of a stream; `context` is the model's longest sequence. Raises DatasetError."""
    told = spec.dataset
    if told.streaming:
        source = open_source(told.source, split=told.split)
        return StreamedFeed(source, tokenizer, row_settings(told, context), spec)
    return WholeFeed(load_dataset(told, tokenizer, context=context, seed=spec.seed), spec)
