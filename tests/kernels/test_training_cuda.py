"""The training pass on a CUDA device: float32 beside the CPU's, bfloat16 within its rounding, and adapters served."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lmesh_kernels.layers.packed_batch import pack_batch
from lmesh_kernels.layers.recompute import Recompute
from lmesh_kernels.lora.factors import Adapter, Factors, content_digest
from lmesh_kernels.lora.initial import initial_adapter
from lmesh_kernels.lora.peft_config import PeftConfig
from lmesh_kernels.lora.peft_files import write_adapter
from lmesh_kernels.lora.trainable import TrainableAdapter
from lmesh_kernels.models.decoder import Decoder
from lmesh_kernels.models.parameters import Parameters, Precision
from lmesh_kernels.models.registry import load_model
from lmesh_kernels.models.training import TrainingPass
from lmesh_kernels.text.resolve import local_files
from lmesh_trainer.learner import Learner
from lmesh_trainer.optimiser import AdamW, Optimiser
from lmesh_worker.engine.config import EngineConfig
from lmesh_worker.engine.engine import Engine
from lmesh_worker.messages import Params, Start
from torch import Tensor

from tests.kernels.training_peer import rows
from tests.tiny_model import save_tiny_llama

pytestmark = pytest.mark.gpu
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SEGMENTS = rows(250, (33, 1, 120, 64, 7, 200))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("tiny"))


def random_adapter(decoder: Decoder, seed: int = 3, rank: int = 8) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    fresh = initial_adapter(PeftConfig(r=rank, alpha=16, target_modules="all-linear"), decoder.config, seed=seed)
    return {
        site: Factors(a=f.a, b=torch.randn(f.b.shape, generator=generator) * 0.1, scale=f.scale)
        for site, f in fresh.items()
    }


def gradients(
    folder: Path,
    device: torch.device,
    precision: Precision,
    *,
    full: bool = False,
    recompute: Recompute = Recompute.NONE,
) -> tuple[float, Tensor]:
    decoder = load_model(local_files(folder), dtype=precision.dtype, device=device)
    if full:
        slots = {name: slot for name, slot in decoder.named_buffers() if name != "rotations"}
        parameters = Parameters(slots, precision)
        training = TrainingPass(decoder, trained={p.name: p.trained for p in parameters}, recompute=recompute)
    else:
        adapter = TrainableAdapter(random_adapter(decoder), decoder.config, precision=precision, device=device)
        parameters = adapter.parameters
        training = TrainingPass(decoder, adapters=adapter.products, recompute=recompute)
    sums = training.loss(pack_batch(SEGMENTS, device))
    sums.loss.backward()
    return float(sums.loss.detach()), parameters.gradients.cpu()


def distance(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("full", [False, True])
def test_float32_as_on_the_cpu(folder: Path, full: bool) -> None:
    wanted, found = (gradients(folder, device, Precision.FLOAT32, full=full) for device in (CPU, CUDA))
    assert found[0] == pytest.approx(wanted[0], rel=1e-5)
    assert distance(found[1], wanted[1]) < 1e-4


@pytest.mark.parametrize("full", [False, True])
def test_bfloat16_within_its_rounding(folder: Path, full: bool) -> None:
    wanted = gradients(folder, CPU, Precision.FLOAT32, full=full)
    found = gradients(folder, CUDA, Precision.BF16, full=full)
    assert found[0] == pytest.approx(wanted[0], rel=1e-2)
    assert distance(found[1], wanted[1]) < 0.08


@pytest.mark.parametrize("recompute", [Recompute.SELECTIVE, Recompute.FULL, Recompute.OFFLOAD])
def test_recomputing_gives_the_same(folder: Path, recompute: Recompute) -> None:
    kept = gradients(folder, CUDA, Precision.BF16)
    again = gradients(folder, CUDA, Precision.BF16, recompute=recompute)
    # Attention's backward pass adds up in an order of its own.
    assert again[0] == kept[0] and distance(again[1], kept[1]) < 1e-2


@pytest.mark.parametrize("precision", list(Precision))
def test_a_learner_learns(folder: Path, precision: Precision) -> None:
    decoder = load_model(local_files(folder), dtype=precision.dtype, device=CUDA)
    adapter = TrainableAdapter(random_adapter(decoder), decoder.config, precision=precision, device=CUDA)
    training = TrainingPass(decoder, adapters=adapter.products)
    learner = Learner(training, adapter.parameters, Optimiser(adapter.parameters, AdamW()), max_grad_norm=1.0)
    batch = pack_batch(SEGMENTS, CUDA)
    losses = [learner.update([batch], step=step, rate=3e-3).loss for step in range(12)]
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("precision", [Precision.FLOAT32, Precision.BF16])
def test_an_8_bit_optimiser_goes_on_from_its_state(folder: Path, precision: Precision) -> None:
    """Matrices remember 8 bits a number and norms 32; four steps, or two and two more in another process's place."""
    settings = AdamW(weight_decay=0.1, eight_bit=True)

    def begun() -> tuple[Parameters, Optimiser]:
        decoder = load_model(local_files(folder), dtype=precision.dtype, device=CUDA)
        slots = {name: slot for name, slot in decoder.named_buffers() if name != "rotations"}
        parameters = Parameters(slots, precision)
        return parameters, Optimiser(parameters, settings)

    def steps(parameters: Parameters, optimiser: Optimiser, *numbers: int) -> None:
        for number in numbers:
            generator = torch.Generator().manual_seed(number)
            parameters.gradients.copy_(torch.randn(parameters.gradients.shape, generator=generator))
            optimiser.step(1e-2)

    whole, first, second = begun(), begun(), begun()
    fresh = {p.name: p.master.clone() for p in whole[0]}
    steps(*whole, 1, 2, 3, 4)
    steps(*first, 1, 2)
    state = {name: tensor.cpu().clone() for name, tensor in first[1].state().items()}
    widths = {name.rpartition("/")[0]: t.dtype for name, t in state.items() if name.endswith("/state1")}
    assert widths["layers.0.attention.qkv.weight"] == torch.uint8 and widths["norm.weight"] == torch.float32
    for mine, theirs in zip(second[0], first[0], strict=True):
        mine.master.copy_(theirs.master)
    second[1].load(state)
    steps(*second, 3, 4)
    for wanted, found in zip(whole[0], second[0], strict=True):
        assert torch.equal(wanted.master, found.master), wanted.name
        assert not torch.equal(wanted.master, fresh[wanted.name])
    wanted_state, found_state = whole[1].state(), second[1].state()
    assert wanted_state.keys() == found_state.keys()
    assert all(torch.equal(tensor.cpu(), found_state[name].cpu()) for name, tensor in wanted_state.items())


@pytest.mark.parametrize("eight_bit", [False, True])
def test_a_learner_learns_as_well_in_8_bits(folder: Path, eight_bit: bool) -> None:
    decoder = load_model(local_files(folder), dtype=torch.bfloat16, device=CUDA)
    adapter = TrainableAdapter(random_adapter(decoder, rank=64), decoder.config, precision=Precision.BF16, device=CUDA)
    optimiser = Optimiser(adapter.parameters, AdamW(eight_bit=eight_bit))
    learner = Learner(
        TrainingPass(decoder, adapters=adapter.products), adapter.parameters, optimiser, max_grad_norm=1.0
    )
    batch = pack_batch(SEGMENTS, CUDA)
    losses = [learner.update([batch], step=step, rate=3e-3).loss for step in range(12)]
    assert losses[-1] < 0.9 * losses[0]


def test_a_mixed_batch_on_the_device(folder: Path, tmp_path: Path) -> None:
    files = local_files(folder)
    shapes = load_model(files, dtype=torch.float32, device=CPU)
    adapters = [random_adapter(shapes, seed, rank) for seed, rank in ((1, 4), (2, 64))]
    kinds = ["", *(content_digest(adapter) for adapter in adapters)]
    for number, adapter in enumerate(adapters):
        write_adapter(tmp_path / str(number), adapter, base="tiny")

    def run(device: str, together: bool) -> dict[int, list[int]]:
        engine = Engine(
            EngineConfig(
                device=device, dtype="float32", kv_blocks=256, max_seqs=16, max_step_tokens=64, model_digest="t"
            ),
            files,
        )
        for number, digest in enumerate(kinds[1:]):
            engine.adapters.load(digest, str(tmp_path / str(number)))
        loaded = 0
        while loaded < len(adapters):
            for found in engine.adapters.loaded():
                assert not found.reason
                loaded += 1
        starts = [
            Start(
                k,
                f"r{k}",
                0,
                [(k * 7 + i) % 250 for i in range(10 + 9 * k)],
                10 + 9 * k,
                Params(max_tokens=12),
                "",
                0,
                kinds[k % 3],
            )
            for k in range(9)
        ]
        found_ids = engine.generate(starts) if together else {s.key: engine.generate([s])[s.key] for s in starts}
        engine.close()
        return found_ids

    assert run("cuda", True) == run("cpu", False)
