"""Real processes killed and stopped under streams; benchmarks/chaos.py plays hundreds of these rounds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.chaos.real_mesh import RealMesh, real_mesh
from tests.chaos.rounds import KINDS, STREAMS, play, undisturbed
from tests.tiny_model import save_tiny_llama

MAX_TOKENS = 300


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealMesh]:
    model = save_tiny_llama(tmp_path_factory.mktemp("tiny"))
    with real_mesh(tmp_path_factory.mktemp("run"), model) as running:
        yield running


@pytest.fixture(scope="module")
def due(mesh: RealMesh) -> dict[int, list[list[list[int]]]]:
    return {count: undisturbed(mesh, count, MAX_TOKENS) for count in sorted(set(STREAMS.values()))}


@pytest.mark.parametrize("kind", KINDS)
def test_streams_survive(mesh: RealMesh, due: dict[int, list[list[list[int]]]], kind: str) -> None:
    found = play(mesh, kind, 1, due[STREAMS[kind]], MAX_TOKENS)
    assert found.good, found
