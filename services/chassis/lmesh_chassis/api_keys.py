"""API keys: drawn here, kept by their owner, and known to the mesh by digest only."""

from __future__ import annotations

import hashlib
import secrets

# Tells what it is when it turns up where it should not: in a log, in a repository, in a scanner.
PREFIX = "lmk_"
_RANDOM_BYTES = 32
# Longer ones are not looked at: a caller must not choose how much is hashed.
MAX_KEY_LENGTH = 512


def draw_key() -> str:
    """A new key of 256 random bits. It is shown once: the mesh cannot tell it again."""
    return PREFIX + secrets.token_urlsafe(_RANDOM_BYTES)


def digest_of(key: str) -> str:
    """What the tenants file holds of a key: its sha256 in lower-case hex.

    A plain hash is enough, for keys are random: there is no list of likely ones to try.
    """
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
