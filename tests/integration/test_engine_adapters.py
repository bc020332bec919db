"""Many adapters and the base in one batch: each sequence gets what it would get alone, and as PEFT would give it."""

from __future__ import annotations

import shutil
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lmesh_kernels.layers.packed_batch import Segment, pack_batch
from lmesh_kernels.lora.factors import Adapter, content_digest
from lmesh_kernels.lora.peft_files import read_adapter
from lmesh_kernels.lora.trainable import TrainableAdapter
from lmesh_kernels.models.hf_config import hf_config
from lmesh_kernels.models.parameters import Precision
from lmesh_kernels.models.registry import load_model
from lmesh_kernels.models.training import TrainingPass
from lmesh_kernels.text.resolve import ModelFiles, local_files
from lmesh_worker.engine.config import EngineConfig
from lmesh_worker.engine.engine import Engine
from lmesh_worker.messages import AdapterLoaded, Params, Start, StepReport
from transformers import AutoModelForCausalLM

from tests.kernels.training_peer import with_adapter
from tests.tiny_model import save_tiny_llama

CPU = torch.device("cpu")
KINDS: dict[str, dict[str, Any]] = {
    "rank 4": {"r": 4},
    "rank 64": {"r": 64, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    "rsLoRA": {"r": 16, "use_rslora": True},
    "DoRA": {"r": 8, "use_dora": True},
}
Build = Callable[..., Engine]


class Stored:
    """An adapter that PEFT wrote, and PEFT's own model with it."""

    def __init__(self, base: Path, folder: Path, seed: int, options: dict[str, Any]) -> None:
        peer = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
        self.peer = with_adapter(peer, folder, seed=seed, **options).eval()
        self.folder = folder
        self.adapter: Adapter = read_adapter(folder, hf_config(base))
        self.digest = content_digest(self.adapter)

    def logprobs(self, ids: list[int]) -> torch.Tensor:
        """Of ids[1:], by PEFT's model."""
        return peer_logprobs(self.peer, ids)


@torch.no_grad()
def peer_logprobs(peer: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    logits = peer(torch.tensor([ids]), use_cache=False).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return local_files(save_tiny_llama(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def stored(files: ModelFiles, tmp_path_factory: pytest.TempPathFactory) -> list[Stored]:
    root = tmp_path_factory.mktemp("adapters")
    return [Stored(files.path, root / name, seed, options) for seed, (name, options) in enumerate(KINDS.items())]


@pytest.fixture
def build(files: ModelFiles) -> Iterator[Build]:
    engines: list[Engine] = []

    def make(**settings: Any) -> Engine:
        defaults: dict[str, Any] = {"device": "cpu", "dtype": "float32", "kv_blocks": 256, "max_seqs": 16}
        defaults |= {"max_step_tokens": 48, "max_model_len": 256, "model_digest": "tiny", "max_adapter_bytes": 8 << 20}
        engines.append(Engine(EngineConfig(**(defaults | settings)), files))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def load(engine: Engine, digest: str, folder: Path) -> AdapterLoaded:
    engine.adapters.load(digest, str(folder))
    return awaited(engine)


def awaited(engine: Engine) -> AdapterLoaded:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for loaded in engine.adapters.loaded():
            return loaded
        time.sleep(0.001)
    raise AssertionError("nothing was loaded")


def start(key: int, ids: list[int], adapter: str = "", **params: Any) -> Start:
    return Start(key, f"r{key}", 0, ids, len(ids), Params(**({"max_tokens": 12} | params)), "", 0, adapter)


def prompt(key: int, length: int) -> list[int]:
    return [(7 * key + 3 * i + i * i) % 250 for i in range(length)]


def sixteen(stored: list[Stored]) -> list[Start]:
    """Prompts of 5 to 80 tokens, four over each adapter and none: kinds alternate, so rows of one lie apart."""
    kinds = [one.digest for one in stored] + [""]
    sampled = {"temperature": 0.8, "seed": 11}
    return [start(k, prompt(k, 5 + 5 * k), kinds[k % len(kinds)], **(sampled if k % 3 == 0 else {})) for k in range(16)]


def loaded_engine(build: Build, stored: list[Stored], **settings: Any) -> Engine:
    engine = build(**settings)
    for one in stored:
        found = load(engine, one.digest, one.folder)
        assert not found.reason, found
    return engine


@pytest.mark.parametrize("depth", [0, 1])
def test_a_mixed_batch_gives_each_what_it_gets_alone(build: Build, stored: list[Stored], depth: int) -> None:
    together = loaded_engine(build, stored, pipeline_depth=depth).generate(sixteen(stored))
    alone_engine = loaded_engine(build, stored, prefix_cache=False)
    alone = {s.key: alone_engine.generate([s])[s.key] for s in sixteen(stored)}
    assert together == alone
    assert len({tuple(ids) for ids in together.values()}) > 12


def scored(engine: Engine, ids: list[int], digest: str) -> list[float]:
    """Log-probabilities of the prompt from its second id."""
    engine.add(start(0, ids, digest, prompt_logprobs=0, max_tokens=0))
    found: list[float] = []
    while engine.has_work:
        report = engine.step()
        if report is not None:
            assert not report.errors, report.errors
            found += [value for columns in report.logprobs for value in columns.chosen]
    return found


@pytest.mark.parametrize("which", range(len(KINDS)), ids=list(KINDS))
def test_served_as_peft_computes_it(build: Build, files: ModelFiles, stored: list[Stored], which: int) -> None:
    ids, one = prompt(3, 120), stored[which]
    engine = loaded_engine(build, [one])
    found = torch.tensor(scored(engine, ids, one.digest))
    assert torch.allclose(found, one.logprobs(ids), atol=1e-4)
    base = AutoModelForCausalLM.from_pretrained(files.path, dtype=torch.float32)
    assert float((one.logprobs(ids) - peer_logprobs(base, ids)).abs().mean()) > 0.1


@pytest.mark.parametrize("which", range(len(KINDS)), ids=list(KINDS))
def test_trained_and_served_alike(build: Build, files: ModelFiles, stored: list[Stored], which: int) -> None:
    """The trainer's log-probabilities of what the worker decodes, prompt in chunks and token by token."""
    one, ids = stored[which], prompt(5, 100)
    engine = loaded_engine(build, [one])
    engine.add(start(0, ids, one.digest, max_tokens=64, logprobs=0, prompt_logprobs=0))
    served: list[float] = []
    decoded: list[int] = []
    while engine.has_work:
        report = engine.step()
        if report is not None:
            decoded += report.ids
            served += [v for columns in report.logprobs if columns.prompt for v in columns.chosen]
            served += [v for columns in report.logprobs if not columns.prompt for v in columns.chosen]
    decoder = load_model(files, dtype=torch.float32, device=CPU)
    adapter = TrainableAdapter(one.adapter, decoder.config, precision=Precision.FLOAT32, device=CPU)
    whole = ids + decoded
    batch = pack_batch([Segment(row=0, ids=whole, weights=[1.0] * len(whole))], CPU)
    trained = TrainingPass(decoder, adapters=adapter.products).logprobs(batch)[:-1]
    assert len(decoded) == 64 and float((trained - torch.tensor(served)).abs().max()) < 1e-4


def test_no_block_of_one_is_used_for_another(build: Build, stored: list[Stored]) -> None:
    engine = loaded_engine(build, stored)
    ids = prompt(1, 64)
    for key, digest in enumerate([*(one.digest for one in stored), ""]):
        engine.generate([start(key, ids, digest, max_tokens=1)])
    assert engine.load().prefix_hit_tokens == 0
    engine.generate([start(9, ids, stored[0].digest, max_tokens=1)])
    assert engine.load().prefix_hit_tokens == 48


def steps(engine: Engine, count: int) -> list[StepReport]:
    return [report for _ in range(count) if (report := engine.step()) is not None]


def test_loading_and_dropping_while_others_run(build: Build, stored: list[Stored]) -> None:
    first, second = stored[0], stored[1]
    engine = loaded_engine(build, [first])
    wanted = engine.generate([start(1, prompt(1, 30), first.digest), start(2, prompt(2, 30))])
    engine.add(start(1, prompt(1, 30), first.digest))
    engine.add(start(2, prompt(2, 30)))
    reports = steps(engine, 3)
    engine.adapters.load(second.digest, str(second.folder))
    engine.adapters.drop(first.digest)
    engine.add(start(3, prompt(1, 30), first.digest))  # it is leaving: nothing new runs with it
    while engine.has_work:
        reports += steps(engine, 1)
    assert awaited(engine).digest == second.digest
    got: dict[int, list[int]] = {}
    for report in reports:
        at = 0
        for key, count in zip(report.keys, report.n_new, strict=True):
            got.setdefault(key, []).extend(report.ids[at : at + count])
            at += count
    assert {key: got[key] for key in (1, 2)} == wanted and got[3] == []
    (error,) = [error for report in reports for error in report.errors]
    assert error.reason == "ADAPTER_NOT_LOADED"
    assert engine.adapters.bank.get(first.digest) is None and len(engine.adapters.bank) == 1


def test_one_that_leaves_stays_in_memory_until_no_step_reads_it(build: Build, stored: list[Stored]) -> None:
    """Its sequence was aborted, so nobody uses it; the step in flight has its row, and reads it by address."""
    first = stored[0]
    engine = loaded_engine(build, [first], pipeline_depth=1)
    resident = engine.adapters.bank.get(first.digest)
    assert resident is not None
    memory = weakref.ref(resident.directory)
    del resident
    engine.add(start(1, prompt(1, 30), first.digest))
    engine.add(start(2, prompt(2, 30)))
    steps(engine, 4)
    engine.abort(1)
    engine.adapters.drop(first.digest)
    assert engine.adapters.bank.get(first.digest) is None and memory() is not None
    steps(engine, 1)
    assert memory() is not None, "the step that was in flight has just been committed"
    steps(engine, 2)
    assert memory() is None and engine.has_work
    idle = loaded_engine(build, [first], pipeline_depth=1)
    idle.adapters.drop(first.digest)
    steps(idle, 1)
    assert not idle.adapters._parted


def test_an_unknown_adapter_ends_its_sequence_alone(build: Build) -> None:
    engine = build()
    wanted = engine.generate([start(1, prompt(1, 20))])
    engine.add(start(1, prompt(1, 20)))
    engine.add(start(2, prompt(2, 20), "f" * 64))
    reports = []
    while engine.has_work:
        reports += steps(engine, 1)
    (error,) = [error for report in reports for error in report.errors]
    assert error.reason == "ADAPTER_NOT_LOADED"
    assert [i for report in reports for i in report.ids] == wanted[1]


class TestRefusals:
    def test_other_content(self, build: Build, stored: list[Stored]) -> None:
        assert load(build(), "0" * 64, stored[0].folder).reason == "ADAPTER_DIGEST_MISMATCH"

    def test_no_files(self, build: Build, tmp_path: Path) -> None:
        assert load(build(), "0" * 64, tmp_path / "none").reason == "NO_CONFIG"

    def test_damaged_files(self, build: Build, stored: list[Stored], tmp_path: Path) -> None:
        shutil.copytree(stored[0].folder, tmp_path / "copy")
        weights = tmp_path / "copy" / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        assert load(build(), stored[0].digest, tmp_path / "copy").reason == "NO_WEIGHTS"

    def test_another_model_s(self, build: Build, tmp_path: Path) -> None:
        other = save_tiny_llama(tmp_path / "other", layers=3)
        peer = AutoModelForCausalLM.from_pretrained(other)
        with_adapter(peer, tmp_path / "adapter")
        found = load(build(), "0" * 64, tmp_path / "adapter")
        assert found.reason == "UNKNOWN_TENSORS" and "layers.2" in found.message

    def test_a_full_bank(self, build: Build, stored: list[Stored]) -> None:
        small, large = stored[0], stored[1]
        engine = build(max_adapter_bytes=60_000)
        assert not load(engine, small.digest, small.folder).reason
        assert load(engine, large.digest, large.folder).reason == "ADAPTER_TOO_LARGE"
        tight = build(max_adapter_bytes=2 * engine.adapters.bank.used_bytes - 1)
        assert not load(tight, small.digest, small.folder).reason
        assert load(tight, stored[3].digest, stored[3].folder).reason in ("ADAPTER_BANK_FULL", "ADAPTER_TOO_LARGE")
        tight.adapters.drop(small.digest)
        assert len(tight.adapters.bank) == 0
