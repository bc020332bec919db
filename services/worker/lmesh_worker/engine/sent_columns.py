"""What a step sends to its device: columns, filled up to the sizes of a graph where it has one."""

from __future__ import annotations

from lmesh_kernels.ops.attention_work import FIELDS, Pieces, Shape
from lmesh_kernels.ops.sample_params import SampleHints
from lmesh_kernels.ops.segmented_plan import SegmentTables

from lmesh_worker.engine.buffers import Filled
from lmesh_worker.engine.graphs import GraphKey, mode_of
from lmesh_worker.engine.inputs import StepColumns
from lmesh_worker.engine.logit_tables import Asked
from lmesh_worker.engine.slots import Slots


def columns_of(
    columns: StepColumns,
    pieces: Pieces,
    slots: Slots,
    told: SampleHints,
    key: GraphKey | None = None,
    tables: SegmentTables | None = None,
    asked: Asked | None = None,
) -> dict[str, Filled]:
    """All that a step sends, filled up to the graph's sizes where it has one.

    What fills up belongs to the spare slot and its block, and asks for no attention.
    """
    tokens, samples = (None, None) if key is None else (key.tokens, key.samples)
    of = columns.sample_slots
    drawing = mode_of(told) != "greedy"
    sent = moving_columns(columns, pieces, slots, key, drawing=drawing) | {
        "ids": (columns.ids, tokens, 0),
        "token_slots": (columns.token_slots, tokens, -1),
        "sample_tokens": (columns.sample_tokens, samples, 0),
        "sample_slots": (of, samples, slots.spare),
    }
    if tables is not None:
        room = None if key is None or key.adapters is None else key.adapters.tiles
        sent["adapter_order"] = (tables.order, tokens, 0)
        sent["adapter_tiles"] = (tables.tiles, room, 0)
        sent["adapter_directories"] = (tables.directories, room, 0)
    if asked is not None:
        sent["repetition"] = (asked.repetition, samples, 1)
        sent["presence"] = (asked.presence, samples, 0)
        sent["frequency"] = (asked.frequency, samples, 0)
        sent["seen_row"] = (asked.seen_row, samples, -1)
        sent["bias_row"] = (asked.bias_row, samples, -1)
    if not drawing:  # argmax reads nothing of the rest
        return sent
    return sent | {
        "seed": (slots.seed[of], samples, 0),
        "choice": (slots.choice[of], samples, 0),
        "temperature": (slots.temperature[of], samples, 0),
        "top_p": (slots.top_p[of], samples, 1),
        "top_k": (slots.top_k[of], samples, 0),
        "floor": (slots.floor[of], samples, 0),
    }


def moving_columns(
    columns: StepColumns, pieces: Pieces, slots: Slots, key: GraphKey | None, *, drawing: bool
) -> dict[str, Filled]:
    """Of those, what changes while the same rows go on."""
    tokens, samples, narrow, wide = (None,) * 4 if key is None else (key.tokens, key.samples, key.narrow, key.wide)
    moving: dict[str, Filled] = {
        "counts": (pieces.counts, None, 0),
        "narrow": (pieces.narrow, narrow, 0),
        "wide": (pieces.wide, wide, 0),
        "parts_first": (pieces.parts_first, tokens, 0),
        "parts": (pieces.parts, tokens, 0),
        "positions": (columns.positions, tokens, 0),
        "kv_slots": (columns.kv_slots, tokens, slots.spare_kv_slot),
    }
    if drawing:
        moving["position"] = (columns.sample_positions, samples, 0)
    return moving


def most_words(max_tokens: int, max_seqs: int, slots: Slots, shape: Shape) -> int:
    """Room for the columns of the largest step, table entries that it changes, adapters' tiles and scored prompts."""
    tokens, rows = max_tokens + 1024, max_seqs + 1024
    pieces = 2 * FIELDS * (tokens + shape.programs // shape.kv_heads)
    return 16 * tokens + 24 * rows + pieces + 2 * slots.tables.size + 4096
