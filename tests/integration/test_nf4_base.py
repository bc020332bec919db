"""An NF4 base: computed as its unfolded weights are, read from bitsandbytes' checkpoints, trained on and served."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from lmesh_kernels.layers.packed_batch import Segment, pack_batch
from lmesh_kernels.lora.factors import content_digest
from lmesh_kernels.lora.peft_files import read_adapter
from lmesh_kernels.lora.trainable import TrainableAdapter
from lmesh_kernels.models.decoder import Decoder
from lmesh_kernels.models.footprint import parameter_bytes
from lmesh_kernels.models.parameters import Precision
from lmesh_kernels.models.registry import load_model
from lmesh_kernels.models.training import TrainingPass
from lmesh_kernels.quant.nf4 import dequantise, quantise
from lmesh_kernels.text.digests import base_digest, model_digest
from lmesh_kernels.text.resolve import ModelFiles, local_files
from lmesh_trainer.events import Outcome
from lmesh_worker.engine.config import ConfigError, EngineConfig
from lmesh_worker.engine.engine import Engine
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests import training_jobs
from tests.integration.test_engine_adapters import load, prompt, scored

CPU = torch.device("cpu")
PRODUCTS = ("_proj.weight",)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return training_jobs.save_model(tmp_path_factory.mktemp("plain"))


def changed(plain: Path, folder: Path, tensors: dict[str, Tensor], **config: object) -> Path:
    """The checkpoint with other tensors."""
    shutil.copytree(plain, folder)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    told = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(told | config))
    return folder


@pytest.fixture(scope="module")
def unfolded(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with the products' weights as NF4 leaves them."""
    tensors = load_file(plain / "model.safetensors")
    for name in [name for name in tensors if name.endswith(PRODUCTS)]:
        tensors[name] = dequantise(quantise(tensors[name]), torch.float32)
    return changed(plain, tmp_path_factory.mktemp("unfolded") / "m", tensors)


@pytest.fixture(scope="module")
def saved_by_bitsandbytes(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As transformers saves a model that it loaded with load_in_4bit; one projection was left out of it."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        if not name.endswith(PRODUCTS) or "layers.1.mlp.up_proj" in name:
            tensors[name] = tensor
            continue
        packed, state = bnb.quantize_4bit(tensor, blocksize=64, compress_statistics=True, quant_type="nf4")
        tensors |= {name: packed, **{f"{name}.{part}": t for part, t in state.as_dict(packed=True).items()}}
    told = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    return changed(plain, tmp_path_factory.mktemp("bnb") / "m", tensors, quantization_config=told)


def logprobs(decoder: Decoder, ids: list[int]) -> Tensor:
    return TrainingPass(decoder, adapters={}).logprobs(
        pack_batch([Segment(row=0, ids=ids, weights=[1.0] * len(ids))], CPU)
    )


def nf4(files: ModelFiles) -> Decoder:
    return load_model(files, dtype=torch.float32, device=CPU, quantisation="nf4")


def test_computed_as_its_unfolded_weights(plain: Path, unfolded: Path) -> None:
    ids, base = prompt(1, 90), load_model(local_files(plain), dtype=torch.float32, device=CPU)
    wanted = logprobs(load_model(local_files(unfolded), dtype=torch.float32, device=CPU), ids)
    found = logprobs(nf4(local_files(plain)), ids)
    assert torch.equal(found, wanted)
    assert float((found - logprobs(base, ids)).abs().mean()) > 0.01


def test_its_size_is_what_is_planned(plain: Path) -> None:
    decoder = nf4(local_files(plain))
    parts = [m.quantised.nbytes for m in decoder.modules() if getattr(m, "quantised", None) is not None]
    planned = parameter_bytes(decoder.config, torch.float32, "nf4")
    held = decoder.arena.nbytes + decoder.rotations.nbytes + sum(parts)
    assert planned == pytest.approx(held, rel=0.01)
    assert planned < 0.5 * parameter_bytes(decoder.config, torch.float32)


def test_bitsandbytes_checkpoints_are_read_to_the_bit(saved_by_bitsandbytes: Path) -> None:
    files = local_files(saved_by_bitsandbytes)
    decoder = load_model(files, dtype=torch.float32, device=CPU)
    assert decoder.quantisation == "nf4"
    tensors = load_file(saved_by_bitsandbytes / "model.safetensors")
    for layer in range(2):
        parts = [f"model.layers.{layer}.self_attn.{p}_proj.weight" for p in "qkv"]
        theirs = [bnb.dequantize_4bit(tensors[p], state_of(tensors, p)) for p in parts]
        assert torch.equal(decoder.product(f"layers.{layer}.attention.qkv").matrix(), torch.cat(theirs))
    kept = tensors["model.layers.1.mlp.up_proj.weight"]
    assert torch.equal(decoder.product("layers.1.mlp.gate_up").matrix()[kept.shape[0] :], kept)


def state_of(tensors: dict[str, Tensor], name: str) -> bnb.QuantState:
    parts = {key: value for key, value in tensors.items() if key.startswith(f"{name}.")}
    return bnb.QuantState.from_dict(parts, device=CPU)


def test_an_engine_serves_it(saved_by_bitsandbytes: Path) -> None:
    files, ids = local_files(saved_by_bitsandbytes), prompt(2, 100)
    found = torch.tensor(scored(engine(files, "auto"), ids, ""))
    wanted = logprobs(load_model(files, dtype=torch.float32, device=CPU), ids)[: len(found)]
    assert float((found - wanted).abs().max()) < 1e-4
    with pytest.raises(ConfigError, match="quantization none"):
        engine(files, "none")


def engine(files: ModelFiles, quantization: str) -> Engine:
    settings = {"device": "cpu", "dtype": "float32", "kv_blocks": 64, "max_seqs": 4, "max_step_tokens": 48}
    return Engine(EngineConfig(**settings, quantization=quantization, max_adapter_bytes=8 << 20), files)


def test_the_recipe_is_part_of_its_name(plain: Path, saved_by_bitsandbytes: Path) -> None:
    files = local_files(plain)
    assert base_digest(files) == model_digest(files) and base_digest(files, nf4=True) == f"{model_digest(files)}+nf4"
    theirs = local_files(saved_by_bitsandbytes)  # its own weights are what they are
    assert base_digest(theirs, nf4=True) == base_digest(theirs) == model_digest(theirs)


def test_trained_as_on_its_unfolded_weights_and_served(plain: Path, unfolded: Path, tmp_path: Path) -> None:
    rows = training_jobs.save_dataset(tmp_path / "rows.jsonl")
    found = training_jobs.run(training_jobs.spec(plain, rows, load_in_4bit=True), tmp_path / "job")
    assert found.ended.outcome == Outcome.COMPLETED, found.ended
    wanted = training_jobs.run(training_jobs.spec(unfolded, rows), tmp_path / "peer")
    assert found.losses == pytest.approx(wanted.losses, abs=1e-5)
    decoder = nf4(local_files(plain))
    adapter = read_adapter(tmp_path / "job" / "adapter", decoder.config)
    served = engine(local_files(plain), "nf4")
    assert not load(served, content_digest(adapter), tmp_path / "job" / "adapter").reason
    ids = prompt(4, 100)
    live = TrainableAdapter(adapter, decoder.config, precision=Precision.FLOAT32, device=CPU)
    batch = pack_batch([Segment(row=0, ids=ids, weights=[1.0] * len(ids))], CPU)
    trained = TrainingPass(decoder, adapters=live.products).logprobs(batch)[:-1]
    assert float((trained - torch.tensor(scored(served, ids, content_digest(adapter)))).abs().max()) < 1e-4
    assert float((trained - logprobs(decoder, ids)[:-1]).abs().mean()) > 0.1


def test_its_weights_are_not_trained(saved_by_bitsandbytes: Path, tmp_path: Path) -> None:
    rows = training_jobs.save_dataset(tmp_path / "rows.jsonl")
    job = training_jobs.spec(saved_by_bitsandbytes, rows, method="full")
    ended = training_jobs.run(job, tmp_path / "job").ended
    assert (ended.outcome, ended.reason) == (Outcome.FAILED, "NOT_SUPPORTED")
