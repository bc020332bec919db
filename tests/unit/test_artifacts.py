"""Artifacts are there whole or not at all, and are what their names say."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lmesh_chassis.artifacts.errors import ArtifactError
from lmesh_chassis.artifacts.folders import fetch_folder, put_folder, read_folder
from lmesh_chassis.artifacts.store import FolderStore, verified
from lmesh_chassis.artifacts.uploads import Uploads


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path / "store")


def digest_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def put(store: FolderStore, data: bytes) -> str:
    return store.put(io.BytesIO(data))


def refused(reason: str) -> Any:
    return pytest.raises(ArtifactError, check=lambda error: error.reason == reason)


class TestStore:
    def test_what_is_put_is_there(self, store: FolderStore) -> None:
        data = os.urandom(3 << 20)
        digest = put(store, data)
        assert digest == digest_of(data) and store.size(digest) == len(data)
        assert b"".join(verified(store, digest)) == data
        assert put(store, data) == digest and not list(store.drafts.iterdir())

    def test_unknown(self, store: FolderStore) -> None:
        for ask in (store.open, store.size):
            with refused("UNKNOWN_ARTIFACT"):
                ask("0" * 64)
        store.delete("0" * 64)

    @pytest.mark.parametrize("name", ["", "../../etc/passwd", "A" * 64, "0" * 63, "0" * 64 + "\n"])
    def test_names_are_digests(self, store: FolderStore, name: str) -> None:
        with refused("BAD_NAME"):
            store.open(name)

    def test_corrupt(self, store: FolderStore) -> None:
        digest = put(store, b"abc")
        store.path(digest).write_bytes(b"abd")
        with refused("CORRUPT_ARTIFACT"):
            list(verified(store, digest))

    def test_a_writer_that_fails_leaves_nothing(self, store: FolderStore) -> None:
        class Breaking(io.BytesIO):
            def read(self, size: int | None = -1) -> bytes:
                if self.tell():
                    raise OSError(errno.ENOSPC, "full")
                return super().read(2)

        with refused("STORE_FULL"):
            store.put(Breaking(b"abcdef"))
        assert not list(store.drafts.iterdir())

    def test_several_at_once(self, store: FolderStore) -> None:
        data = os.urandom(1 << 20)
        digests: list[str] = []
        threads = [threading.Thread(target=lambda: digests.append(put(store, data))) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert digests == [digest_of(data)] * 8 and b"".join(verified(store, digests[0])) == data


class TestFolders:
    def test_there_and_back(self, store: FolderStore, tmp_path: Path) -> None:
        (tmp_path / "a" / "deep").mkdir(parents=True)
        (tmp_path / "a" / "one.txt").write_text("1")
        (tmp_path / "a" / "deep" / "two.bin").write_bytes(b"\0" * 10)
        digest = put_folder(store, tmp_path / "a")
        assert [file.name for file in read_folder(store, digest)] == ["deep/two.bin", "one.txt"]
        found = fetch_folder(store, digest, tmp_path / "b")
        assert (found / "one.txt").read_text() == "1" and (found / "deep" / "two.bin").read_bytes() == b"\0" * 10
        assert put_folder(store, found) == digest
        assert fetch_folder(store, digest, tmp_path / "b") == tmp_path / "b"

    def test_links_are_refused(self, store: FolderStore, tmp_path: Path) -> None:
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "link").symlink_to("/etc/passwd")
        with refused("BAD_NAME"):
            put_folder(store, tmp_path / "a")

    @pytest.mark.parametrize("name", ["../x", "/x", "a/../../x", "", "a\\..\\x", "a\0b"])
    def test_nothing_lands_outside(self, store: FolderStore, tmp_path: Path, name: str) -> None:
        entry = {"name": name, "digest": put(store, b"x"), "size": 1}
        digest = put(store, json.dumps({"kind": "lmesh-folder-v1", "files": [entry]}).encode())
        with refused("CORRUPT_ARTIFACT"):
            fetch_folder(store, digest, tmp_path / "b" / "c")
        assert not (tmp_path / "b").exists()

    def test_twice_the_same_name(self, store: FolderStore, tmp_path: Path) -> None:
        entry = {"name": "x", "digest": put(store, b"x"), "size": 1}
        digest = put(store, json.dumps({"kind": "lmesh-folder-v1", "files": [entry, entry]}).encode())
        with refused("CORRUPT_ARTIFACT"):
            fetch_folder(store, digest, tmp_path / "b")
        assert not (tmp_path / "b").exists()

    def test_a_file_that_is_corrupt_or_gone(self, store: FolderStore, tmp_path: Path) -> None:
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "one").write_text("1")
        digest = put_folder(store, tmp_path / "a")
        (file,) = read_folder(store, digest)
        store.path(file.digest).write_text("2")
        with refused("CORRUPT_ARTIFACT"):
            fetch_folder(store, digest, tmp_path / "b")
        store.delete(file.digest)
        with refused("UNKNOWN_ARTIFACT"):
            fetch_folder(store, digest, tmp_path / "b")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "store"]

    def test_a_plain_artifact_is_no_folder(self, store: FolderStore) -> None:
        for data in (b"abc", b"{}", b"[]", b'{"kind": "other", "files": []}'):
            with refused("CORRUPT_ARTIFACT"):
                read_folder(store, put(store, data))


class TestUploads:
    @given(st.binary(min_size=1, max_size=200), st.data())
    @settings(deadline=None)
    def test_pieces_of_any_size_and_breaks(
        self, tmp_path_factory: pytest.TempPathFactory, data: bytes, draw: Any
    ) -> None:
        store = FolderStore(tmp_path_factory.mktemp("store"))
        uploads, digest = Uploads(store, max_bytes=1000), digest_of(data)
        at = uploads.begin(digest, len(data))
        while at < len(data):
            if draw.draw(st.booleans()):  # another process goes on
                uploads = Uploads(store, max_bytes=1000)
                assert uploads.begin(digest, len(data)) == at
            count = draw.draw(st.integers(1, 50))
            at = uploads.append(digest, at, data[at : at + count], size=len(data))
        assert uploads.commit(digest, size=len(data)) == digest
        assert b"".join(verified(store, digest)) == data
        assert uploads.begin(digest, len(data)) == len(data)

    def test_refusals(self, store: FolderStore) -> None:
        uploads, digest = Uploads(store, max_bytes=10), digest_of(b"abcd")
        for size in (0, 11):
            with refused("BAD_UPLOAD"):
                uploads.begin(digest, size)
        with refused("BAD_NAME"):
            uploads.begin("../x", 3)
        uploads.append(digest, 0, b"ab", size=4)
        for offset, piece in ((0, b"ab"), (3, b"d"), (2, b"cde")):
            with refused("BAD_UPLOAD"):
                uploads.append(digest, offset, piece, size=4)
        with refused("BAD_UPLOAD"):
            uploads.commit(digest, size=4)
        uploads.append(digest, 2, b"cX", size=4)
        with refused("CORRUPT_ARTIFACT"):
            uploads.commit(digest, size=4)
        assert uploads.begin(digest, 4) == 0

    def test_a_reserve_is_left(self, store: FolderStore, monkeypatch: pytest.MonkeyPatch) -> None:
        free = SimpleNamespace(free=105)
        monkeypatch.setattr("lmesh_chassis.artifacts.uploads.shutil.disk_usage", lambda path: free)
        uploads, digest = Uploads(store, max_bytes=10, reserve_bytes=100), digest_of(b"abcdef")
        with refused("STORE_FULL"):
            uploads.begin(digest, 6)
        assert uploads.begin(digest, 5) == 0
        uploads.append(digest, 0, b"abc", size=6)
        free.free = 102  # what is there already needs no room any more
        with refused("STORE_FULL"):
            uploads.begin(digest, 6)
        free.free = 103
        assert uploads.begin(digest, 6) == 3
        uploads.append(digest, 3, b"def", size=6)
        uploads.commit(digest, size=6)
        free.free = 0
        assert uploads.begin(digest, 6) == 6  # whole: nothing is to be sent

    def test_old_drafts_go(self, store: FolderStore) -> None:
        uploads = Uploads(store, max_bytes=10, keep_s=60)
        uploads.append(digest_of(b"abcd"), 0, b"ab", size=4)
        assert uploads.sweep() == 0
        os.utime(next(store.drafts.iterdir()), (1, 1))
        assert uploads.sweep() == 1 and uploads.begin(digest_of(b"abcd"), 4) == 0
