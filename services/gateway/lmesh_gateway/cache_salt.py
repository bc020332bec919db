"""The salt that keeps one tenant's prefix cache from every other's."""

from __future__ import annotations

import hashlib
import hmac


def cache_salt(tenant: str, *, key: str, model_digest: str) -> str:
    """Hex HMAC-SHA256 of the tenant's id; "" for the tenant "" of an open mesh.

    `key` is the setting `cache_salt_key`, the same in all gateways of a mesh; where it is empty the model's digest is
    the key, which every gateway knows: tenants are kept apart all the same, for a salt is never taken from a client.
    """
    if not tenant:
        return ""
    return hmac.new((key or model_digest).encode(), tenant.encode(), hashlib.sha256).hexdigest()
