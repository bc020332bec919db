"""Losses and gradients of the training pass beside transformers' and PEFT's, and what must not change them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lmesh_kernels.layers.recompute import Recompute
from lmesh_kernels.lora.factors import content_digest
from lmesh_kernels.lora.peft_files import read_adapter
from lmesh_kernels.lora.sites import sites
from lmesh_kernels.models.weights import bindings
from lmesh_kernels.ops.dropout import Dropout, dropout_keys
from torch import Tensor, nn

from tests.kernels.tiny_families import FAMILIES, SHAPE, Family, load_peer, save_family
from tests.kernels.training_peer import Ours, batch, load, peer_loss, rows, with_adapter

VOCAB = SHAPE["vocab_size"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "all linears": {},
    "attention": {"target_modules": ["q_proj", "v_proj"], "r": 3},
    "patterns": {"rank_pattern": {"k_proj": 2, "down_proj": 17}, "alpha_pattern": {"up_proj": 5}, "use_rslora": True},
    "DoRA": {"use_dora": True, "r": 4},
}


def close(ours: Tensor, theirs: Tensor, bound: float = 5e-5) -> None:
    """Equal norm-wise."""
    assert ours.shape == theirs.shape
    distance = float((ours.double() - theirs.double()).norm())
    assert distance <= bound * float(theirs.double().norm()) + 1e-9


def assert_adapter_gradients(ours: Ours, peer: nn.Module) -> None:
    assert ours.adapter is not None
    named = {name.removeprefix("base_model.model."): p for name, p in peer.named_parameters() if p.requires_grad}
    shapes = sites(ours.decoder.config)
    for site in ours.adapter.adapter():
        part = next(p for p in ours.adapter.products[shapes[site].slot].parts if p.start == shapes[site].start)
        a = ours.adapter.products[shapes[site].slot].a.grad[part.ranks]
        for grad, leaf in ((a, "lora_A.default.weight"), (part.b.grad, "lora_B.default.weight")):
            wanted = named.pop(f"{site.theirs}.{leaf}").grad
            assert wanted is not None
            close(grad, wanted)
        if part.magnitude is not None:
            wanted = named.pop(f"{site.theirs}.lora_magnitude_vector.default.weight").grad
            assert wanted is not None
            close(part.magnitude.grad, wanted)
    assert not named


@pytest.fixture(params=FAMILIES, ids=lambda family: family.name)
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    family: Family = request.param
    return save_family(family, tmp_path / "base")


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return save_family(FAMILIES[0], tmp_path / "base")


def test_adapter_gradients_of_every_family(base: Path, tmp_path: Path) -> None:
    peer = with_adapter(load_peer(base), tmp_path / "adapter")
    ours, segments = load(base, tmp_path / "adapter"), rows(VOCAB)
    wanted = peer_loss(peer, segments)
    wanted.backward()
    assert ours.gradient(segments) == pytest.approx(wanted.item(), rel=1e-6)
    assert_adapter_gradients(ours, peer)


@pytest.mark.parametrize("options", ADAPTERS.values(), ids=ADAPTERS)
def test_adapter_gradients(small: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    peer = with_adapter(load_peer(small), tmp_path / "adapter", **options)
    ours, segments = load(small, tmp_path / "adapter"), rows(VOCAB)
    wanted = peer_loss(peer, segments)
    wanted.backward()
    assert ours.gradient(segments) == pytest.approx(wanted.item(), rel=1e-6)
    assert_adapter_gradients(ours, peer)


def test_full_gradients_of_every_family(base: Path) -> None:
    peer = load_peer(base)
    ours, segments = load(base), rows(VOCAB)
    wanted = peer_loss(peer, segments)
    wanted.backward()
    assert ours.gradient(segments) == pytest.approx(wanted.item(), rel=1e-6)
    named = dict(peer.named_parameters())
    for name, place in bindings(ours.decoder.config).items():
        if name in named:
            grad = named[name].grad
            assert grad is not None
            close(ours.parameters[place.slot].trained.grad[place.start : place.start + place.rows], grad)


@pytest.mark.parametrize("recompute", [Recompute.SELECTIVE, Recompute.FULL, Recompute.OFFLOAD])
@pytest.mark.parametrize("adapter", [True, False])
def test_recomputing_changes_no_bit(small: Path, tmp_path: Path, recompute: Recompute, adapter: bool) -> None:
    folder = tmp_path / "adapter" if adapter else None
    if adapter:
        with_adapter(load_peer(small), tmp_path / "adapter")
    kept, again, segments = load(small, folder), load(small, folder, recompute), rows(VOCAB)
    assert kept.gradient(segments) == again.gradient(segments)
    assert torch.equal(kept.parameters.gradients, again.parameters.gradients)


@pytest.mark.parametrize("recompute", [Recompute.SELECTIVE, Recompute.FULL, Recompute.OFFLOAD])
@pytest.mark.parametrize("dora", [False, True])
def test_recomputing_draws_the_same_dropout(small: Path, tmp_path: Path, recompute: Recompute, dora: bool) -> None:
    """The mask that a part of a layer meets on its second way is the first's, to the bit; and it is a mask."""
    with_adapter(load_peer(small), tmp_path / "adapter", use_dora=dora)
    packed = batch(rows(VOCAB))
    dropout = Dropout(rate=0.4, keys=dropout_keys(7, 3, packed.rows, packed.positions))
    found = []
    for policy, drops in ((Recompute.NONE, dropout), (recompute, dropout), (recompute, None)):
        ours = load(small, tmp_path / "adapter", policy)
        sums = ours.training.loss(packed, drops)
        sums.loss.backward()
        found.append((float(sums.loss.detach()), ours.parameters.gradients))
    kept, again, without = found
    assert kept[0] == again[0] and torch.equal(kept[1], again[1])
    assert kept[0] != without[0] and not torch.allclose(kept[1], without[1], rtol=0.1)


@pytest.mark.parametrize("adapter", [True, False])
def test_packed_and_accumulated_are_the_same(small: Path, tmp_path: Path, adapter: bool) -> None:
    folder = tmp_path / "adapter" if adapter else None
    if adapter:
        with_adapter(load_peer(small), tmp_path / "adapter")
    ours, segments = load(small, folder), rows(VOCAB)
    together = ours.gradient(segments)
    packed = ours.parameters.gradients.clone()
    ours.parameters.clear()
    apart = 0.0
    for segment in segments:
        sums = ours.training.loss(batch([segment]))
        sums.loss.backward()
        apart += float(sums.loss)
    assert apart == pytest.approx(together, rel=1e-6)
    close(ours.parameters.gradients, packed, 1e-5)


def test_small_chunks_of_the_head_change_nothing(small: Path, tmp_path: Path) -> None:
    segments = rows(VOCAB)
    whole, chunked = load(small), load(small, chunk_bytes=3 * 4 * VOCAB)
    assert chunked.gradient(segments) == pytest.approx(whole.gradient(segments), rel=1e-7)
    close(chunked.parameters.gradients, whole.parameters.gradients)


def test_log_probabilities_are_the_loss(small: Path) -> None:
    ours, packed = load(small), batch(rows(VOCAB))
    found = ours.training.logprobs(packed)
    assert float(-(found * packed.weights).sum()) == pytest.approx(float(ours.training.loss(packed).loss), rel=1e-6)


def test_an_adapter_comes_out_as_it_went_in(small: Path, tmp_path: Path) -> None:
    with_adapter(load_peer(small), tmp_path / "adapter", use_dora=True, rank_pattern={"k_proj": 2})
    ours = load(small, tmp_path / "adapter")
    assert ours.adapter is not None
    known = read_adapter(tmp_path / "adapter", ours.decoder.config)
    assert content_digest(ours.adapter.adapter()) == content_digest(known)
