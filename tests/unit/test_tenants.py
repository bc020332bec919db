"""The tenants file is read strictly, and no fault in it is told with what may be a key."""

from __future__ import annotations

from pathlib import Path

import pytest
from lmesh_chassis.api_keys import digest_of, draw_key
from lmesh_chassis.tenants import Tenant, load_tenants

A, B = "a" * 64, "b" * 64
KEY = "lmk_someone-pasted-the-key-itself-here-000"


def written(tmp_path: Path, text: str) -> str:
    path = tmp_path / "tenants.toml"
    path.write_text(text)
    return str(path)


def test_every_field_is_read(tmp_path: Path) -> None:
    text = f"""
    [tenants.acme]
    key_digests = ["{A}", "{B}"]
    weight = 2
    max_queued = 10
    max_live = 20
    requests_per_minute = 30
    tokens_per_minute = 40
    [tenants."b.c-d_1"]
    key_digests = []
    """
    acme = Tenant("acme", (A, B), 2.0, 10, 20, 30, 40)
    assert load_tenants(written(tmp_path, text)) == {"acme": acme, "b.c-d_1": Tenant("b.c-d_1", ())}


@pytest.mark.parametrize(
    ("text", "entry"),
    [
        ("", "no [tenants.<id>]"),
        ("tenants = 5", "no [tenants.<id>]"),
        ("[tenants]", "no [tenants.<id>]"),
        ("[tenant.a]", "tenant is not known"),
        ("[tenants]\na = 5", "tenants.a: must be a table"),
        ("[tenants.a]", "tenants.a.key_digests: must be given"),
        (f'[tenants.a]\nkey_digests = "{A}"', "tenants.a.key_digests: must be a list"),
        (f'[tenants.a]\nkey_digests = ["{A}", "{KEY}"]', "tenants.a.key_digests[1]"),
        (f'[tenants.a]\nkey_digests = ["{A.upper()}"]', "tenants.a.key_digests[0]"),
        ("[tenants.a]\nkey_digests = [5]", "tenants.a.key_digests[0]"),
        ("[tenants.a]\nkey_digests = []\nweigth = 1", "weigth is not known"),
        ("[tenants.a]\nkey_digests = []\nid = 'b'", "id is not known"),
        ("[tenants.a]\nkey_digests = []\nweight = 0", "tenants.a.weight"),
        ("[tenants.a]\nkey_digests = []\nweight = true", "tenants.a.weight"),
        ("[tenants.a]\nkey_digests = []\nweight = nan", "tenants.a.weight"),
        ("[tenants.a]\nkey_digests = []\nmax_live = -1", "tenants.a.max_live"),
        ("[tenants.a]\nkey_digests = []\nmax_queued = 1.5", "tenants.a.max_queued"),
        ("[tenants.a]\nkey_digests = []\nrequests_per_minute = true", "tenants.a.requests_per_minute"),
        ("[tenants.'']\nkey_digests = []", "an id has"),
        ("[tenants.'a b']\nkey_digests = []", "an id has"),
        (f"[tenants.{'c' * 65}]\nkey_digests = []", "an id has"),
        (f'[tenants.a]\nkey_digests = ["{A}"]\n[tenants.b]\nkey_digests = ["{A}"]', "tenants.b.key_digests[0]"),
        (f"key_digests = [{KEY}]", "line 1"),
        (f'[tenants.a]\nkey_digests = ["{A}"]\n[tenants.a]', "is not a TOML file"),
    ],
)
def test_faults_are_named_and_values_are_not(tmp_path: Path, text: str, entry: str) -> None:
    with pytest.raises(ValueError) as caught:
        load_tenants(written(tmp_path, text))
    assert entry in str(caught.value)
    assert KEY not in str(caught.value) and A not in str(caught.value)
    assert caught.value.__cause__ is None  # nor by a traceback


def test_what_is_no_text_is_no_toml(tmp_path: Path) -> None:
    path = tmp_path / "t"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="not a TOML file"):
        load_tenants(str(path))


def test_a_missing_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_tenants(str(tmp_path / "none"))


def test_a_drawn_key_and_its_digest() -> None:
    keys = {draw_key() for _ in range(100)}
    assert len(keys) == 100
    assert all(key.startswith("lmk_") and len(key) == 47 for key in keys)
    # sha256 as any tool computes it: `printf %s abc | sha256sum`
    assert digest_of("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
