"""Hashes of KV blocks: the one function that scheduler and worker share.

A block's hash covers everything that its keys and values depend on: the root binds model, weights version, adapter
content, tenant salt and KV format; each block binds its parent, its ids and the media inside it. Every field is
tagged and length-prefixed, so no two different inputs give the same bytes to hash.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from hashlib import blake2b

HASH_BYTES = 16
_GRANULE_TOKENS = 64  # of the prefix index: a message and a look-up a block would be too many
_LENGTH = struct.Struct("<Q")


def _field(tag: bytes, value: bytes) -> bytes:
    return tag + _LENGTH.pack(len(value)) + value


def _digest(*fields: bytes) -> bytes:
    return blake2b(b"".join(fields), digest_size=HASH_BYTES).digest()


def root_hash(
    *, model_digest: str, weights_version: int, adapter_digest: str = "", cache_salt: str = "", kv_format: str
) -> bytes:
    """The parent of a sequence's first block, 16 bytes.

    `kv_format` names dtype, block size and layout. Adapters go by content digest, never by name.
    """
    return _digest(
        _field(b"model", model_digest.encode()),
        _field(b"weights", _LENGTH.pack(weights_version)),
        _field(b"adapter", adapter_digest.encode()),
        _field(b"salt", cache_salt.encode()),
        _field(b"kv", kv_format.encode()),
    )


def block_hash(parent: bytes, ids: Sequence[int], media: Sequence[tuple[str, int]] = ()) -> bytes:
    """The hash of a full block, 16 bytes.

    `ids` are its token ids (each below 2^32); `media` the (content digest, offset in the block) of media inside it.
    """
    fields = [_field(b"parent", parent), _field(b"ids", struct.pack(f"<{len(ids)}I", *ids))]
    for digest, offset in media:
        fields += [_field(b"media", digest.encode()), _field(b"at", _LENGTH.pack(offset))]
    return _digest(*fields)


def prefix_hashes(root: bytes, ids: Sequence[int], block_size: int) -> list[bytes]:
    """Hashes of the full blocks of `ids`, each chained to the one before; len(ids) // block_size of them."""
    hashes: list[bytes] = []
    parent = root
    for begin in range(0, len(ids) - block_size + 1, block_size):
        parent = block_hash(parent, ids[begin : begin + block_size])
        hashes.append(parent)
    return hashes


def granule_blocks(block_size: int) -> int:
    """Blocks of one granule of the prefix index: 64 tokens, or as near below as blocks allow, at least one block."""
    return max(1, _GRANULE_TOKENS // block_size)


def granule_hashes(root: bytes, ids: Sequence[int], *, block_size: int, granule: int) -> list[bytes]:
    """Hashes of the full granules of `ids`, `granule` blocks each; a granule's hash is that of its last block."""
    return prefix_hashes(root, ids, block_size)[granule - 1 :: granule]
