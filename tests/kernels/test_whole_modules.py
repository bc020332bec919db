"""Embedding and head under training beside an adapter: gradients beside PEFT's, tied ones too; grown vocabularies."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from lmesh_kernels.layers.recompute import Recompute
from lmesh_kernels.models.config import load_config
from lmesh_kernels.models.growth import Growth
from lmesh_kernels.models.registry import load_model
from lmesh_kernels.text.resolve import local_files

from tests.kernels.test_training_pass import assert_adapter_gradients, close
from tests.kernels.tiny_families import FAMILIES, SHAPE, load_peer, save_family
from tests.kernels.training_peer import load, peer_loss, rows, with_adapter

CPU, VOCAB = torch.device("cpu"), SHAPE["vocab_size"]
BY_NAME = {family.name: family for family in FAMILIES}
TIED, UNTIED = "llama-gqa-tied", "qwen2-mha-sharded"
SLOTS = {"embed_tokens": "embedding.weight", "lm_head": "head.weight"}


@pytest.mark.parametrize("named", [("embed_tokens",), ("lm_head",), ("embed_tokens", "lm_head")])
def test_gradients_beside_an_adapter(tmp_path: Path, named: tuple[str, ...]) -> None:
    base = save_family(BY_NAME[UNTIED], tmp_path / "base")
    same = with_adapter(load_peer(base), tmp_path / "adapter").state_dict()
    settings = {"r": 8, "lora_alpha": 12, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    peer = peft.get_peft_model(load_peer(base), peft.LoraConfig(**settings, modules_to_save=list(named)))
    peer.load_state_dict({name: tensor for name, tensor in same.items() if "lora_" in name}, strict=False)
    ours = load(base, tmp_path / "adapter", beside=tuple(SLOTS[name] for name in named))
    segments = rows(VOCAB)
    wanted = peer_loss(peer, segments)
    wanted.backward()
    assert ours.gradient(segments) == pytest.approx(wanted.item(), rel=1e-6)
    grads = {name: p.grad for name, p in peer.named_parameters() if p.requires_grad and "modules_to_save" in name}
    assert len(grads) == len(named)
    for name in named:
        (grad,) = (g for path, g in grads.items() if f".{name}." in path)
        close(ours.parameters[SLOTS[name]].trained.grad, grad)


@pytest.mark.parametrize("recompute", [Recompute.NONE, Recompute.FULL])
def test_a_tied_matrix_has_both_gradients(tmp_path: Path, recompute: Recompute) -> None:
    base = save_family(BY_NAME[TIED], tmp_path / "base")
    peer = with_adapter(load_peer(base), tmp_path / "adapter")
    matrix = peer.get_input_embeddings().weight
    assert matrix is peer.get_output_embeddings().weight
    ours, segments = load(base, tmp_path / "adapter", recompute, beside=("embedding.weight",)), rows(VOCAB)
    wanted = peer_loss(peer, segments)
    wanted.backward()  # of the adapter alone: the matrix is frozen
    assert ours.gradient(segments) == pytest.approx(wanted.item(), rel=1e-6)
    assert_adapter_gradients(ours, peer)
    matrix.requires_grad_(True)
    peer.zero_grad()
    peer_loss(peer, segments).backward()
    assert matrix.grad is not None
    close(ours.parameters["embedding.weight"].trained.grad, matrix.grad)


@pytest.mark.parametrize("name", [TIED, UNTIED])
@pytest.mark.parametrize(("known", "added"), [(VOCAB, 5), (VOCAB - 10, 4), (VOCAB - 3, 7)])
def test_a_grown_vocabulary(tmp_path: Path, name: str, known: int, added: int) -> None:
    """Against transformers' own resizing, with our mean put into the new rows."""
    files = local_files(save_family(BY_NAME[name], tmp_path / "base"))
    growth = Growth(known=known, added=added)
    decoder = load_model(files, dtype=torch.float32, device=CPU, growth=growth)
    wanted = max(VOCAB, known + added)
    assert decoder.config.vocab_size == growth.config(load_config(files)).vocab_size == wanted
    peer = load_peer(files.path)
    peer.resize_token_embeddings(wanted, mean_resizing=False)
    with torch.no_grad():
        for module in {peer.get_input_embeddings(), peer.get_output_embeddings()}:
            module.weight[known : known + added] = module.weight[:known].double().mean(0).float()
    for slot, module in (("embedding", peer.get_input_embeddings()), ("head", peer.get_output_embeddings())):
        if slot == "head" and decoder.head is None:
            continue
        found = decoder.get_buffer(f"{slot}.weight")
        assert torch.allclose(found, module.weight, atol=1e-6)
        assert torch.equal(found[:known], module.weight[:known])  # what was known is untouched


def test_new_tokens_are_hardly_said_at_first(tmp_path: Path) -> None:
    """The bound that the mean gives: what was said before loses log(1 + n / known) nats at most."""
    files = local_files(save_family(BY_NAME[UNTIED], tmp_path / "base"))
    hidden = torch.randn(50, SHAPE["hidden_size"], generator=torch.Generator().manual_seed(3))
    plain, grown = (
        load_model(files, dtype=torch.float32, device=CPU, growth=g).logits(hidden).log_softmax(-1)
        for g in (None, Growth(known=VOCAB, added=9))
    )
    lost = (plain - grown[:, :VOCAB]).max()
    assert 0 < float(lost) <= torch.log1p(torch.tensor(9 / VOCAB)) + 1e-5
    assert float(grown[:, VOCAB:].exp().max()) <= 1 / VOCAB + 1e-6
