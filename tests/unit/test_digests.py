"""Digests go by content, and a large file is read once."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
from lmesh_kernels.text.digests import file_digest, model_digest, text_digest
from lmesh_kernels.text.resolve import ModelFiles

FILES = {
    "config.json": "{}",
    "model-1.safetensors": "one",
    "model-2.safetensors": "two",
    "tokenizer.json": "{}",
    "chat_template.jinja": "hello",
    "README.md": "about",
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LMESH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def model(folder: Path, **changed: str) -> ModelFiles:
    folder.mkdir()
    for name, text in {**FILES, **changed}.items():
        (folder / name).write_text(text)
    return ModelFiles(source=str(folder), path=folder, format="hf")


def test_equal_files_elsewhere_have_equal_digests(tmp_path: Path) -> None:
    a, b = model(tmp_path / "a"), model(tmp_path / "b")
    assert model_digest(a) == model_digest(b) and text_digest(a) == text_digest(b)
    assert len(model_digest(a)) == len(text_digest(a)) == 64


@pytest.mark.parametrize(
    ("name", "weights", "text"),
    [
        ("config.json", True, True),
        ("model-2.safetensors", True, False),
        ("tokenizer.json", False, True),
        ("chat_template.jinja", False, True),
        ("README.md", False, False),
    ],
)
def test_each_digest_covers_its_files(tmp_path: Path, name: str, weights: bool, text: bool) -> None:
    before, after = model(tmp_path / "a"), model(tmp_path / "b", **{name: "changed"})
    assert (model_digest(before) != model_digest(after)) == weights
    assert (text_digest(before) != text_digest(after)) == text


def test_contents_cannot_move_between_files(tmp_path: Path) -> None:
    swapped = {"model-1.safetensors": "two", "model-2.safetensors": "one"}
    assert model_digest(model(tmp_path / "a")) != model_digest(model(tmp_path / "b", **swapped))


def test_a_gguf_is_its_one_file(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(b"GGUF")
    files = ModelFiles(source=str(path), path=path, format="gguf")
    first = model_digest(files)
    assert first == text_digest(files)
    path.write_bytes(b"GGUF changed")
    assert model_digest(files) != first


def test_a_digest_is_remembered_until_the_file_changes(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"one")
    stamp = path.stat()
    first = file_digest(path)
    assert first == hashlib.sha256(b"one").hexdigest()
    path.write_bytes(b"two")
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert file_digest(path) == first  # same size and time: not read again
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns + 1))
    assert file_digest(path) == hashlib.sha256(b"two").hexdigest()


def test_a_damaged_note_is_made_again(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"one")
    expected = file_digest(path)
    (note,) = (cache / "digests").iterdir()
    note.write_text("{")
    assert file_digest(path) == expected
    assert [n.read_text() != "{" for n in (cache / "digests").iterdir()] == [True]


def test_a_cache_that_cannot_be_written_only_costs_time(
    tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"one")
    cache.write_text("a file where the folder should be")
    assert file_digest(path) == hashlib.sha256(b"one").hexdigest()
    assert "not kept" in caplog.text
