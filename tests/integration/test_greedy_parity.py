"""Greedy ids equal transformers' in float32 on the CPU, whatever the engine's settings.

CI runs six prompts over settings that cover every pair of values; `make test-full` runs all twenty prompts over
all sixteen combinations and writes tests/results/greedy-parity.json.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from itertools import product
from pathlib import Path

import pytest
import torch
import transformers
from lmesh_kernels.text.resolve import resolve
from lmesh_kernels.text.tokenizer import load_tokenizer
from lmesh_worker.engine.config import EngineConfig
from lmesh_worker.engine.engine import Engine
from lmesh_worker.messages import Params, Start

from tests.greedy_prompts import CI_PROMPTS, greedy_prompts

SOURCE = "packaged:smollm2-135m-instruct"
NEW_TOKENS = 24
RESULT = Path(__file__).parents[1] / "results" / "greedy-parity.json"


@dataclass(frozen=True)
class Setting:
    """One way to run the engine."""

    together: bool  # all prompts at once, or each alone
    prefix_cache: bool
    chunk: int  # tokens of a step
    small_pool: bool  # holds the longest prompt and little more, so that a crowd preempts

    @property
    def name(self) -> str:
        return "-".join(
            (
                "together" if self.together else "alone",
                "cache" if self.prefix_cache else "nocache",
                f"chunk{self.chunk}",
                "small" if self.small_pool else "ample",
            )
        )


# Six rows cover every pair of values of the four factors.
PAIRWISE = (
    Setting(together=True, prefix_cache=True, chunk=16, small_pool=True),
    Setting(together=True, prefix_cache=False, chunk=512, small_pool=False),
    Setting(together=False, prefix_cache=True, chunk=512, small_pool=True),
    Setting(together=False, prefix_cache=False, chunk=16, small_pool=False),
    Setting(together=True, prefix_cache=False, chunk=512, small_pool=True),
    Setting(together=False, prefix_cache=True, chunk=16, small_pool=False),
)
ALL = tuple(Setting(*values) for values in product((True, False), (True, False), (16, 512), (True, False)))


@cache
def prompt_ids() -> dict[str, list[int]]:
    """Token ids of the twenty prompts by name."""
    tokenizer = load_tokenizer(resolve(SOURCE))
    encoded = {p.name: (tokenizer.encode(p.text, add_special_tokens=False), p.keep_ids) for p in greedy_prompts()}
    return {name: ids[:keep] if keep else ids for name, (ids, keep) in encoded.items()}


@cache
def reference_model() -> transformers.PreTrainedModel:
    files = resolve(SOURCE)
    quantization = transformers.GgufConfig(dequantize=True)
    return transformers.AutoModelForCausalLM.from_pretrained(
        files.path.parent, gguf_file=files.path.name, quantization_config=quantization, dtype=torch.float32
    ).eval()


@cache
def reference_ids(name: str) -> list[int]:
    """What transformers continues prompt `name` with, end of sequence ignored."""
    model = reference_model()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    ids = torch.tensor([prompt_ids()[name]])
    with torch.inference_mode():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW_TOKENS)
    return out[0, ids.shape[1] :].tolist()


def build_engine(setting: Setting, longest: int) -> Engine:
    # Small blocks in the small pool: every sequence then outgrows what it was admitted with.
    block_size = 4 if setting.small_pool else 16
    needed = -(-(longest + NEW_TOKENS) // block_size)
    blocks = needed + 2 if setting.small_pool else needed * 24
    config = EngineConfig(
        device="cpu",
        dtype="float32",
        block_size=block_size,
        kv_blocks=blocks,
        max_step_tokens=setting.chunk,
        max_seqs=16 if setting.chunk == 16 else 32,
        max_model_len=longest + NEW_TOKENS,
        prefix_cache=setting.prefix_cache,
    )
    return Engine(config, resolve(SOURCE))


def start(key: int, ids: list[int]) -> Start:
    return Start(key, f"r{key}", 0, ids, len(ids), Params(max_tokens=NEW_TOKENS))


def run(engine: Engine, setting: Setting, names: tuple[str, ...]) -> dict[str, list[int]]:
    # The longest first, then the shortest: in a small pool these crowd in beside it, and all outgrow it.
    rising = sorted(names, key=lambda name: len(prompt_ids()[name]))
    names = (rising[-1], *rising[:-1])
    starts = [start(key, prompt_ids()[name]) for key, name in enumerate(names)]
    out = engine.generate(starts) if setting.together else {s.key: engine.generate([s])[s.key] for s in starts}
    return {name: out[key] for key, name in enumerate(names)}


def check(setting: Setting, names: tuple[str, ...]) -> dict[str, object]:
    """Runs one setting and compares; returns what to record."""
    engine = build_engine(setting, max(len(prompt_ids()[n]) for n in names))
    try:
        got = run(engine, setting, names)
        load = engine.load()
    finally:
        engine.close()
    for name in names:
        assert got[name] == reference_ids(name), f"{name} under {setting.name}"
    if setting.together and setting.small_pool:
        assert load.preemptions > 0, "the pool was meant to be too small for the crowd"
    if not setting.prefix_cache:
        assert load.prefix_hit_tokens == 0
    return {**asdict(setting), "prompts": len(names), "preemptions": load.preemptions, "hits": load.prefix_hit_tokens}


@pytest.mark.parametrize("setting", PAIRWISE, ids=lambda s: s.name)
def test_greedy_ids_equal_transformers(setting: Setting) -> None:
    check(setting, CI_PROMPTS)


def test_settings_cover_every_pair() -> None:
    """CI's rows are pairwise complete over the four factors."""
    rows = [(s.together, s.prefix_cache, s.chunk, s.small_pool) for s in PAIRWISE]
    every = [(s.together, s.prefix_cache, s.chunk, s.small_pool) for s in ALL]
    for i, j in product(range(4), repeat=2):
        if i < j:
            assert {(r[i], r[j]) for r in rows} == {(r[i], r[j]) for r in every}


def test_prompts_are_varied() -> None:
    lengths = [len(ids) for ids in prompt_ids().values()]
    assert len(lengths) == 20
    assert min(lengths) == 5
    assert max(lengths) == 1_500


@pytest.fixture(scope="module")
def record() -> Iterator[list[dict[str, object]]]:
    rows: list[dict[str, object]] = []
    yield rows
    if len(rows) == len(ALL):
        RESULT.parent.mkdir(exist_ok=True)
        versions = (
            f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}"
        )
        result = {"model": SOURCE, "new_tokens": NEW_TOKENS, "versions": versions, "equal": rows}
        RESULT.write_text(json.dumps(result, indent=1) + "\n")


@pytest.mark.full
@pytest.mark.timeout(1_800)
@pytest.mark.parametrize("setting", ALL, ids=lambda s: s.name)
def test_all_prompts_under_all_settings(setting: Setting, record: list[dict[str, object]]) -> None:
    record.append(check(setting, tuple(prompt_ids())))
