"""API keys give their tenant and nothing else does; cache salts part tenants."""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path

import pytest
from lmesh_chassis.api_keys import MAX_KEY_LENGTH, digest_of
from lmesh_chassis.settings import SettingsError
from lmesh_chassis.tenants import ANYONE, Tenant
from lmesh_gateway.authentication import Authenticator
from lmesh_gateway.cache_salt import cache_salt
from lmesh_gateway.errors import UnauthenticatedError

KEYS = {"a": ("key-a", "key-a2"), "b": ("key-b",), "locked": ()}


@pytest.fixture(scope="module")
def keyed() -> Authenticator:
    return Authenticator({name: Tenant(name, tuple(map(digest_of, keys))) for name, keys in KEYS.items()})


@pytest.mark.parametrize(
    ("authorization", "api_key", "tenant"),
    [
        ("Bearer key-a", "", "a"),
        ("bearer  key-a2 ", "", "a"),
        ("", "key-b", "b"),
        ("Bearer key-a", "key-b", "a"),
        ("Bearer key-a", "wrong", "a"),
    ],
)
def test_a_known_key_is_its_tenant(keyed: Authenticator, authorization: str, api_key: str, tenant: str) -> None:
    assert keyed.tenant_of(authorization, api_key).id == tenant


@pytest.mark.parametrize(
    ("authorization", "api_key"),
    [
        ("", ""),
        ("", "wrong"),
        ("Bearer", ""),
        ("Bearer ", ""),
        ("Basic key-a", ""),
        ("key-a", ""),
        ("Bearer KEY-A", ""),
        ("Bearer wrong", "key-a"),  # an Authorization header that is there must be right
        ("Bearer " + digest_of("key-a"), ""),
        ("Bearer key-a" + "x" * MAX_KEY_LENGTH, ""),
        ("", "\udcff"),
    ],
)
def test_anything_else_is_refused(keyed: Authenticator, authorization: str, api_key: str) -> None:
    with pytest.raises(UnauthenticatedError) as caught:
        keyed.tenant_of(authorization, api_key)
    for told in (authorization.removeprefix("Bearer ").strip(), api_key):
        assert not told or told in ("Bearer",) or told not in caught.value.message


def test_a_long_key_is_not_cut_to_a_known_one() -> None:
    long = "k" * MAX_KEY_LENGTH
    keyed = Authenticator({"a": Tenant("a", (digest_of(long),))})
    assert keyed.tenant_of(f"Bearer {long}", "").id == "a"
    with pytest.raises(UnauthenticatedError):
        keyed.tenant_of(f"Bearer {long}k", "")


def test_without_a_file_everybody_is_anyone() -> None:
    assert Authenticator.from_file("").tenant_of("Bearer whatever", "") is ANYONE


def test_tenants_without_any_key_let_nobody_in() -> None:
    with pytest.raises(UnauthenticatedError):
        Authenticator({"locked": Tenant("locked", ())}).tenant_of("Bearer x", "")


def test_a_faulty_file_is_a_setting_at_fault(tmp_path: Path) -> None:
    (tmp_path / "t.toml").write_text("[tenants.a]")
    for path in ("t.toml", "none.toml"):
        with pytest.raises(SettingsError, match="LMESH_GATEWAY_TENANTS_FILE"):
            Authenticator.from_file(str(tmp_path / path))


class TestCacheSalt:
    def test_is_the_hmac_of_the_tenant(self) -> None:
        expected = hmac.new(b"secret", b"acme", hashlib.sha256).hexdigest()
        assert cache_salt("acme", key="secret", model_digest="d") == expected
        assert cache_salt("acme", key="", model_digest="d") == hmac.new(b"d", b"acme", hashlib.sha256).hexdigest()

    def test_parts_tenants_and_keys(self) -> None:
        salts = {cache_salt(t, key=k, model_digest=d) for t in "ab" for k in ("", "k") for d in "de"}
        assert len(salts) == 2 * 3  # with a key the digest does not matter, for it is in the root itself

    def test_an_open_mesh_has_none(self) -> None:
        assert cache_salt("", key="secret", model_digest="d") == ""
