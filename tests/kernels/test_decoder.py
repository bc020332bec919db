"""The decoder's logits equal transformers' in float32: whole, in chunks and token by token, for every feature."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lmesh_kernels.layers.attention import PagedAttention
from lmesh_kernels.layers.kv_cache import KVCache
from lmesh_kernels.models.config import ModelConfig, RopeConfig, load_config
from lmesh_kernels.models.decoder import Decoder
from lmesh_kernels.models.registry import load_model
from lmesh_kernels.models.safetensors_folder import read_safetensors
from lmesh_kernels.models.weights import bind, bindings
from lmesh_kernels.text.resolve import ModelFiles

from tests.kernels.paged_runner import CPU, PagedRunner, make_batch
from tests.kernels.tiny_families import FAMILIES, Family, load_peer, peer_logits, save_family

# Of the largest |logit|: float32 rounding over some 10^3 terms a logit, and far below any feature's effect.
BOUND = 1e-4
BY_NAME = {family.name: family for family in FAMILIES}


def sequences() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, 131, (n,), generator=generator).tolist() for n in (61, 1, 18, 7)]


class Case:
    """A saved family, its config and transformers' logits, made once for all tests of the module."""

    def __init__(self, family: Family, folder: Path) -> None:
        self.files = ModelFiles(source=str(folder), path=save_family(family, folder), format="hf")
        self.config = load_config(self.files)
        self.expected = peer_logits(load_peer(folder), sequences())

    def load(self) -> Decoder:
        return load_model(self.files, dtype=torch.float32, device=CPU)

    def load_as(self, config: ModelConfig) -> Decoder:
        """Bound with what `config` has slots for; the rest of the checkpoint stays unread."""
        decoder = Decoder(config, dtype=torch.float32, device=CPU)
        wanted = bindings(config)
        kept = {n: t for n, t in read_safetensors(self.files.path) if n in wanted and not wanted[n].duplicate}
        bind(decoder, kept.items())
        return decoder

    def error(self, actual: list[torch.Tensor]) -> float:
        """Largest difference over the largest logit."""
        largest = max(e.abs().max().item() for e in self.expected)
        return max((a - e).abs().max().item() for a, e in zip(actual, self.expected, strict=True)) / largest


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    torch.set_num_threads(2)
    return {name: Case(family, tmp_path_factory.mktemp(name)) for name, family in BY_NAME.items()}


@pytest.mark.parametrize("name", BY_NAME)
def test_logits_equal_transformers(cases: dict[str, Case], name: str) -> None:
    case = cases[name]
    assert torch.cat(case.expected).std() >= 1.0, "logits too flat for the bound to mean anything"
    decoder = case.load()
    assert case.error(PagedRunner(decoder).full(sequences())) <= BOUND
    assert case.error(PagedRunner(decoder, seed=1).in_chunks(sequences(), (5, 13, 1, 8))) <= BOUND
    assert case.error(PagedRunner(decoder, block_size=1, num_blocks=128).in_chunks(sequences(), (1,))) <= BOUND


def test_prefill_then_decodes_of_uneven_lengths(cases: dict[str, Case]) -> None:
    """Prompts first, then all lanes decode together, long ones beside short ones."""
    case = cases["llama-gqa-tied"]
    runner, ids = PagedRunner(case.load(), block_size=8), sequences()
    heads = [ids[0][:50], ids[2][:2], ids[3][:1]]
    runner.step(dict(enumerate(heads)))
    tails = [ids[0][50:55], ids[2][2:7], ids[3][1:6]]
    decoded = [runner.step({lane: [tail[i]] for lane, tail in enumerate(tails)}) for i in range(5)]
    for lane, (sequence, start) in enumerate(((0, 50), (2, 2), (3, 1))):
        expected = case.expected[sequence][start : start + 5]
        actual = torch.cat([step[lane] for step in decoded])
        assert (actual - expected).abs().max() <= BOUND * expected.abs().max()


@pytest.mark.parametrize(
    ("name", "off"),
    [
        ("llama-mha-biases-linear", {"attention_bias": False}),
        ("llama-mha-biases-linear", {"output_bias": False}),
        ("llama-mha-biases-linear", {"mlp_bias": False}),
        ("llama-mha-biases-linear", {"tie_word_embeddings": True}),
        ("llama-mha-biases-linear", {"rms_norm_eps": 1e-1}),
        ("qwen2-mha-sharded", {"attention_bias": False}),
        ("qwen3-bias-yarn-all", {"attention_bias": False}),
        ("qwen3-bias-yarn-all", {"output_bias": False}),
        ("qwen3-headdim", {"qk_norm": False}),
        ("qwen3-bias-yarn-all", {"qk_norm": False}),
    ],
)
def test_a_feature_switched_off_shows(cases: dict[str, Case], name: str, off: dict[str, object]) -> None:
    case = cases[name]
    assert all(getattr(case.config, key) != value for key, value in off.items())
    decoder = case.load_as(replace(case.config, **off))
    assert case.error(PagedRunner(decoder).full(sequences())) > BOUND


@pytest.mark.parametrize(
    ("name", "off"),
    [
        ("llama-mha-biases-linear", {"type": "default"}),
        ("llama-mqa-headdim-llama3", {"type": "default"}),
        ("llama-mqa-headdim-llama3", {"high_freq_factor": 2.0}),
        ("llama-theta-sharded", {"theta": 10000.0}),
        ("qwen2-tied-yarn", {"type": "default"}),
        ("qwen2-tied-yarn", {"attention_factor": 1.0}),
        ("qwen3-bias-yarn-all", {"mscale": 0.0}),
        ("qwen3-bias-yarn-all", {"truncate": True}),
        ("qwen3-bias-yarn-all", {"beta_fast": 32.0}),
        ("qwen3-bias-yarn-all", {"beta_slow": 1.0}),
        ("qwen3-yarn-factor", {"attention_factor": None}),
    ],
)
def test_a_rope_parameter_switched_off_shows(cases: dict[str, Case], name: str, off: dict[str, object]) -> None:
    case = cases[name]
    assert all(getattr(case.config.rope, key) != value for key, value in off.items())
    decoder = case.load_as(replace(case.config, rope=replace(case.config.rope, **off)))
    assert case.error(PagedRunner(decoder).full(sequences())) > BOUND


def test_families_vary_what_they_claim(cases: dict[str, Case]) -> None:
    configs = {name: case.config for name, case in cases.items()}
    assert {c.num_kv_heads for c in configs.values()} == {1, 2, 4}
    assert {c.tie_word_embeddings for c in configs.values()} == {True, False}
    assert {c.rope.type for c in configs.values()} == {"default", "linear", "llama3", "yarn"}
    assert any(c.q_size != c.hidden_size for c in configs.values())
    for name in ("llama-theta-sharded", "qwen2-mha-sharded"):
        assert len(list(cases[name].files.path.glob("model-*.safetensors"))) > 1


def test_blocks_written_this_step_are_readable_by_neighbours(cases: dict[str, Case]) -> None:
    """A sequence may point at blocks that another sequence of the same step fills."""
    case, block_size = cases["llama-gqa-tied"], 4
    decoder, ids = case.load(), sequences()[0][:24]
    attention = PagedAttention(KVCache(decoder.config, 16, block_size, torch.float32, CPU))
    # The reader comes before the writer in the batch: only layer-wise order can make this right.
    batch = make_batch([ids[16:20], ids], [16, 0], [[9, 8, 7, 6, 1], [9, 8, 7, 6, 5, 4]], block_size)
    logits = decoder.logits(decoder(batch, attention))
    expected = torch.cat([case.expected[0][16:20], case.expected[0][:24]])
    assert (logits - expected).abs().max() <= BOUND * expected.abs().max()


def test_rows_that_are_wanted_alone_are_those_of_the_whole_step(cases: dict[str, Case]) -> None:
    case, block_size = cases["qwen3-headdim"], 4
    decoder, ids = case.load(), sequences()[0][:24]
    kept = []
    for rows in (None, torch.tensor([23, 7, 7]), torch.tensor([0])):
        attention = PagedAttention(KVCache(decoder.config, 16, block_size, torch.float32, CPU))
        batch = make_batch([ids[:8], ids[8:]], [0, 8], [[9, 8], [9, 8, 7, 6, 5, 4]], block_size)
        hidden = decoder(batch, attention, rows)
        expected = hidden if rows is None else kept[0][0][rows]
        assert hidden.shape == expected.shape
        torch.testing.assert_close(hidden, expected)
        kept.append((hidden, attention.kv.data.clone()))
    assert all(torch.equal(data, kept[0][1]) for _, data in kept), "K and V are written of every row"


def test_weights_keep_their_addresses_in_one_arena(cases: dict[str, Case]) -> None:
    decoder = cases["qwen3-headdim"].load()
    begin = decoder.arena.data_ptr()
    end = begin + decoder.arena.numel() * decoder.arena.itemsize
    slots = {name: slot for name, slot in decoder.named_buffers() if name != "rotations"}
    assert all(begin <= slot.data_ptr() < end for slot in slots.values())
    assert all(slot.data_ptr() % 64 == begin % 64 for slot in slots.values())
    assert not list(decoder.parameters())
    assert not any(slot.requires_grad for slot in slots.values())


def test_bfloat16_is_near_float32(cases: dict[str, Case]) -> None:
    case = cases["qwen3-headdim"]
    decoder = load_model(case.files, dtype=torch.bfloat16, device=CPU)
    # Three layers of bfloat16 rounding (2^-8 each, a handful an element and layer): right to some percent.
    assert case.error(PagedRunner(decoder).full(sequences())) < 0.1


def test_default_rope_config_is_plain() -> None:
    assert RopeConfig().type == "default"
    assert RopeConfig().factor == 1.0
