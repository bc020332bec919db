"""Artifacts at the gateway: uploads that break and go on, downloads that are checked, and what is refused."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from lmesh.training.v1 import training_pb2 as pb
from lmesh_chassis.artifacts.errors import ArtifactError
from lmesh_chassis.errors import from_rpc_error
from lmesh_chassis.settings import SettingsError
from lmesh_gateway.artifact_transfer import ArtifactTransfer

from tests.scripted_training import ScriptedTraining
from tests.training_scene import Scene, gateway_before, refused

MIB = 1 << 20


@pytest.fixture
async def scene(tmp_path: Path) -> AsyncIterator[Scene]:
    """Without a scheduler: artifacts need none."""
    settings = {"artifacts": str(tmp_path / "store"), "max_upload_bytes": 8 * MIB}
    async with gateway_before(ScriptedTraining(), **settings) as scene:
        yield scene


def pieces(data: bytes, *, size: int = MIB, begin: int = 0) -> Iterator[pb.UploadRequest]:
    for offset in range(begin, len(data), size):
        yield pb.UploadRequest(offset=offset, data=data[offset : offset + size])


def named(whole: bytes, **fields: Any) -> pb.UploadRequest:
    return pb.UploadRequest(**{"digest": hashlib.sha256(whole).hexdigest(), "size": len(whole)} | fields)


async def upload(scene: Scene, *messages: pb.UploadRequest) -> int:
    return int((await scene.stub.Upload(iter(messages), timeout=30)).received)


async def download(scene: Scene, data: bytes, offset: int = 0) -> bytes:
    request = pb.DownloadRequest(digest=hashlib.sha256(data).hexdigest(), offset=offset)
    got = [response.data async for response in scene.stub.Download(request, timeout=30)]
    assert all(0 < len(piece) <= MIB for piece in got)
    return b"".join(got)


async def test_in_one_message(scene: Scene) -> None:
    assert await upload(scene, named(b"abc", data=b"abc")) == 3
    assert await download(scene, b"abc") == b"abc"


async def test_in_pieces(scene: Scene) -> None:
    data = os.urandom(3 * MIB + 17)
    assert await upload(scene, named(data), *pieces(data)) == len(data)
    assert await download(scene, data) == data
    assert await upload(scene, named(data)) == len(data)  # what is there need not be sent
    assert await upload(scene, named(data), *pieces(data)) == len(data)
    for offset in (1, MIB, len(data) - 1, len(data)):
        assert await download(scene, data, offset) == data[offset:]
    error = await refused(download(scene, data, len(data) + 1))
    assert (error.code, error.field) == (grpc.StatusCode.INVALID_ARGUMENT, "offset")


async def test_a_broken_one_goes_on_where_it_was(scene: Scene) -> None:
    data = os.urandom(3 * MIB)
    call = scene.stub.Upload()
    await call.write(named(data, data=data[:MIB]))
    await call.write(pb.UploadRequest(offset=MIB, data=data[MIB : MIB + 5]))
    async with asyncio.timeout(10):
        while await upload(scene, named(data)) < MIB + 5:  # noqa: ASYNC110 - a call, to be made
            await asyncio.sleep(0.01)
    call.cancel()
    there = await upload(scene, named(data))
    assert there == MIB + 5
    error = await refused(upload(scene, named(data), *pieces(data)))
    assert (error.code, error.reason, error.field) == (grpc.StatusCode.INVALID_ARGUMENT, "BAD_UPLOAD", "offset")
    assert await upload(scene, named(data), *pieces(data, begin=there)) == len(data)
    assert await download(scene, data) == data


async def test_all_there_and_not_stored(scene: Scene, tmp_path: Path) -> None:
    data = b"as a gateway leaves it that dies between the two"
    (tmp_path / "store/drafts" / f"upload-{hashlib.sha256(data).hexdigest()}").write_bytes(data)
    assert await upload(scene, named(data)) == len(data)
    assert await download(scene, data) == data


async def test_other_bytes_than_announced(scene: Scene) -> None:
    error = await refused(upload(scene, named(b"abc", data=b"abd")))
    assert (error.code, error.reason) == (grpc.StatusCode.DATA_LOSS, "CORRUPT_ARTIFACT")
    assert (await refused(download(scene, b"abc"))).reason == "UNKNOWN_ARTIFACT"
    assert await upload(scene, named(b"abc")) == 0  # they were thrown away
    assert await upload(scene, named(b"abc", data=b"abc")) == 3


@pytest.mark.parametrize(
    ("field", "messages"),
    [
        ("digest", []),
        ("digest", [pb.UploadRequest(digest="abc", size=3)]),
        ("digest", [pb.UploadRequest(digest="../../etc/passwd", size=3)]),
        ("size", [named(b"abc", size=0)]),
        ("size", [named(b"abc", size=8 * MIB + 1)]),
        ("data", [named(b"abc", size=2 * MIB, data=bytes(MIB + 1))]),
        ("data", [named(b"abc", size=2 * MIB), pb.UploadRequest(data=bytes(MIB + 1))]),
        ("offset", [named(b"abc", data=b"abcd")]),
        ("offset", [named(b"abc", offset=1, data=b"bc")]),
        ("digest", [named(b"abc", data=b"a"), pb.UploadRequest(digest="0" * 64, offset=1, data=b"bc")]),
        ("size", [named(b"abc", data=b"a"), pb.UploadRequest(size=3, offset=1, data=b"bc")]),
    ],
)
async def test_messages_that_are_wrong(scene: Scene, field: str, messages: list[pb.UploadRequest]) -> None:
    error = await refused(upload(scene, *messages))
    assert (error.code, error.field) == (grpc.StatusCode.INVALID_ARGUMENT, field)


async def test_several_at_once(scene: Scene) -> None:
    data = os.urandom(2 * MIB)
    calls = [upload(scene, named(data), *pieces(data, size=MIB // 4)) for _ in range(4)]
    results = await asyncio.gather(*calls, return_exceptions=True)
    errors = [result for result in results if isinstance(result, grpc.aio.AioRpcError)]
    # Of a call that ends while the client writes its own library says INTERNAL, 3 of 60 times on a busy machine.
    faults = [from_rpc_error(error).reason for error in errors if error.code() is not grpc.StatusCode.INTERNAL]
    assert len(data) in results and set(faults) <= {"BAD_UPLOAD"}
    assert await download(scene, data) == data


async def test_unknown_and_corrupt(scene: Scene, tmp_path: Path) -> None:
    error = await refused(download(scene, b"never"))
    assert (error.code, error.reason) == (grpc.StatusCode.NOT_FOUND, "UNKNOWN_ARTIFACT")
    for name in ("", "../x"):
        error = await refused(scene.stub.Download(pb.DownloadRequest(digest=name), timeout=10).read())
        assert (error.code, error.field) == (grpc.StatusCode.INVALID_ARGUMENT, "digest")
    data = os.urandom(MIB + 1)
    await upload(scene, named(data), *pieces(data))
    digest = hashlib.sha256(data).hexdigest()
    (tmp_path / "store" / digest[:2] / digest).write_bytes(data[:-1])
    error = await refused(download(scene, data))
    assert (error.code, error.reason) == (grpc.StatusCode.DATA_LOSS, "CORRUPT_ARTIFACT")
    assert await download(scene, data, MIB // 2) == data[MIB // 2 : -1]  # a part cannot be checked


async def test_a_full_disk(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> int:
        raise ArtifactError("STORE_FULL", "the artifact store has no room left")

    monkeypatch.setattr("lmesh_chassis.artifacts.uploads.Uploads.append", full)
    error = await refused(upload(scene, named(b"abc", data=b"abc")))
    assert (error.code, error.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "STORE_FULL")


async def test_a_download_that_is_given_up(scene: Scene) -> None:
    data = os.urandom(8 * MIB)
    await upload(scene, named(data), *pieces(data))
    call = scene.stub.Download(pb.DownloadRequest(digest=hashlib.sha256(data).hexdigest()))
    await call.read()
    call.cancel()
    assert await download(scene, data) == data


async def test_none_without_a_store() -> None:
    async with gateway_before(ScriptedTraining()) as scene:
        for call in (upload(scene, named(b"abc", data=b"abc")), download(scene, b"abc")):
            error = await refused(call)
            assert (error.code, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "ARTIFACTS_DISABLED")


def test_a_folder_that_is_none_stops_the_boot(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match="LMESH_GATEWAY_ARTIFACTS"):
        ArtifactTransfer.from_folder(str(tmp_path / "file"), max_bytes=1)
