"""Which parameters decay: those that transformers' Trainer lets decay, in every family."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lmesh_kernels.models.parameters import Parameters, Precision
from lmesh_kernels.models.registry import load_model
from lmesh_kernels.models.weights import bindings
from lmesh_kernels.text.resolve import local_files
from lmesh_trainer.optimiser import AdamW, Optimiser
from transformers import Trainer

from tests.kernels.tiny_families import FAMILIES, Family, load_peer, save_family

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_what_decays_decays_there_too(family: Family, tmp_path: Path) -> None:
    files = local_files(save_family(family, tmp_path / "base"))
    decoder = load_model(files, dtype=torch.float32, device=CPU)
    slots = {name: slot for name, slot in decoder.named_buffers() if name != "rotations"}
    before = {name: slot.clone() for name, slot in slots.items()}
    parameters = Parameters(slots, Precision.FLOAT32)
    # Without a gradient only the decay moves anything.
    Optimiser(parameters, AdamW(weight_decay=0.1)).step(0.5)
    peer = load_peer(files.path)
    theirs = set(Trainer.get_decay_parameter_names(None, peer))
    names = {name for name, _ in peer.named_parameters()}
    assert names & theirs and names - theirs
    for name, place in bindings(decoder.config).items():
        if name in names:
            factor = 0.95 if name in theirs else 1.0
            assert torch.allclose(slots[place.slot], factor * before[place.slot], rtol=1e-6, atol=0), name
