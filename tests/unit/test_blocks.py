"""Block hashes: equal for equal contents, different for anything that keys and values depend on."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lmesh_kernels.blocks import HASH_BYTES, block_hash, prefix_hashes, root_hash

BASE: dict[str, Any] = {"model_digest": "ab" * 32, "weights_version": 1, "kv_format": "float32/16"}
token_ids = st.lists(st.integers(0, 2**32 - 1), max_size=70)
ROOT = root_hash(**BASE)


@pytest.mark.parametrize(
    "other",
    [
        {"model_digest": "cd" * 32},
        {"weights_version": 2},
        {"adapter_digest": "x"},
        {"cache_salt": "x"},
        {"kv_format": "bfloat16/16"},
    ],
)
def test_every_field_of_the_root_counts(other: dict[str, Any]) -> None:
    assert root_hash(**BASE | other) != ROOT


@settings(deadline=None)
@given(st.text(max_size=6), st.text(max_size=6))
def test_text_cannot_move_from_one_field_to_the_next(adapter: str, salt: str) -> None:
    joined = root_hash(**BASE, adapter_digest=adapter + salt, cache_salt="")
    apart = root_hash(**BASE, adapter_digest=adapter, cache_salt=salt)
    assert (joined == apart) == (salt == "")


@settings(deadline=None)
@given(token_ids, st.integers(1, 20))
def test_prefixes_are_chained_full_blocks(ids: list[int], size: int) -> None:
    hashes = prefix_hashes(ROOT, ids, size)
    assert len(hashes) == len(ids) // size
    parent = ROOT
    for number, found in enumerate(hashes):
        parent = block_hash(parent, ids[number * size : (number + 1) * size])
        assert found == parent and len(found) == HASH_BYTES


@settings(deadline=None)
@given(token_ids, token_ids, st.integers(1, 8))
def test_two_sequences_share_exactly_their_common_blocks(a: list[int], b: list[int], size: int) -> None:
    common = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    ours, theirs = prefix_hashes(ROOT, a, size), prefix_hashes(ROOT, b, size)
    shared = sum(x == y for x, y in zip(ours, theirs, strict=False))
    assert shared == min(common // size, len(ours), len(theirs))
    assert not set(ours[shared:]) & set(theirs[shared:])


def test_equal_ids_under_another_root_or_parent_differ() -> None:
    other = root_hash(**BASE, cache_salt="tenant")
    assert not set(prefix_hashes(ROOT, [5] * 64, 16)) & set(prefix_hashes(other, [5] * 64, 16))
    assert len(set(prefix_hashes(ROOT, [5] * 64, 16))) == 4


def test_media_count_by_content_place_and_order() -> None:
    variants = [(), [("aa", 0)], [("aa", 1)], [("bb", 0)], [("aa", 0), ("bb", 1)], [("bb", 1), ("aa", 0)]]
    assert len({block_hash(ROOT, [1, 2, 3], media) for media in variants}) == len(variants)


def test_hashes_do_not_depend_on_the_process() -> None:
    # Scheduler and workers compare hashes that were made in different processes, on different machines.
    assert block_hash(ROOT, (1, 2, 3)) == block_hash(ROOT, [1, 2, 3])
    assert ROOT.hex() == "4fdc931e8e283407371dee612c387ff6"
    assert prefix_hashes(ROOT, range(32), 16)[1].hex() == "094acdbce0e065c637334d2800ed8f95"
