"""A GGUF file of ours in llama.cpp: the same greedy tokens as our own engine over the same file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import xllamacpp
from lmesh_kernels.lora.factors import Adapter, Factors
from lmesh_kernels.lora.initial import initial_adapter
from lmesh_kernels.lora.peft_config import PeftConfig
from lmesh_kernels.models.config import load_config
from lmesh_kernels.text.resolve import ModelFiles, local_files, resolve
from lmesh_kernels.text.tokenizer import load_tokenizer
from lmesh_trainer.export.exporter import ExportKind, export
from lmesh_worker.engine.config import EngineConfig
from lmesh_worker.engine.engine import Engine
from lmesh_worker.messages import Params, Start, StepReport

TOKENS, MARGIN = 32, 0.05
PROMPTS = (
    "The capital of France is",
    "Once upon a time there was a",
    "def fibonacci(n):\n",
    "Water boils at",
    "The three primary colours are",
    "In 1969, the first",
    "A haiku about rain:\n",
    "To bake bread you need",
    "The largest planet of the solar system",
    "1, 2, 3, 5, 8,",
)


def adapter_of(files: ModelFiles) -> Adapter:
    """A random one, strong enough to be seen and weak enough to leave language."""
    generator = torch.Generator().manual_seed(1)
    fresh = initial_adapter(PeftConfig(r=4, alpha=4, target_modules=["q_proj", "v_proj"]), load_config(files), seed=0)
    return {
        site: Factors(a=f.a, b=torch.randn(f.b.shape, generator=generator) * 0.02, scale=f.scale)
        for site, f in fresh.items()
    }


def ours(files: ModelFiles, prompts: list[list[int]]) -> tuple[list[list[int]], list[list[float]]]:
    """Greedy ids of each prompt, and the margin between the two likeliest at each of them."""
    engine = Engine(EngineConfig(device="cpu", dtype="float32", max_model_len=256, model_digest="x"), files)
    for key, ids in enumerate(prompts):
        engine.add(Start(key, str(key), 0, ids, len(ids), Params(max_tokens=TOKENS, logprobs=2)))
    found: list[list[int]] = [[] for _ in prompts]
    margins: list[list[float]] = [[] for _ in prompts]
    while engine.has_work:
        report = engine.step()
        if report is not None:
            _take(report, found, margins)
    engine.close()
    return found, margins


def _take(report: StepReport, found: list[list[int]], margins: list[list[float]]) -> None:
    at = 0
    for key, count in zip(report.keys, report.n_new, strict=True):
        found[key] += report.ids[at : at + count]
        at += count
    for columns in report.logprobs:
        tops = columns.top_logprobs
        margins[report.keys[columns.entry]] += [tops[i] - tops[i + 1] for i in range(0, len(tops), 2)]


def theirs(path: Path, prompts: list[list[int]]) -> list[list[int]]:
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx = 256
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 2
    server = xllamacpp.Server(params)
    request: dict[str, Any] = {"max_tokens": TOKENS, "temperature": 0.0, "logprobs": 1}
    answers = (server.handle_completions({**request, "prompt": ids}) for ids in prompts)
    return [[entry["id"] for entry in answer["choices"][0]["logprobs"]["content"]] for answer in answers]


def test_the_same_tokens_as_llama_cpp(tmp_path: Path) -> None:
    files = resolve("smollm2-135m-instruct")
    done = export(files, adapter_of(files), tmp_path / "model.gguf", ExportKind.GGUF_F16)
    assert done.mean_difference < 0.02
    written = local_files(tmp_path / "model.gguf")
    tokenizer = load_tokenizer(written)
    prompts = [tokenizer.encode(text, add_special_tokens=True) for text in PROMPTS]
    (found, margins), wanted = ours(written, prompts), theirs(tmp_path / "model.gguf", prompts)
    compared = 0
    for text, mine, gaps, other in zip(PROMPTS, found, margins, wanted, strict=True):
        # llama.cpp leaves the end of the sequence out.
        length = next((i for i, token in enumerate(mine) if token in tokenizer.eos_ids), TOKENS)
        first = next((i for i in range(length) if other[i : i + 1] != [mine[i]]), None)
        assert first is None or gaps[first] < MARGIN, (text, first, mine, other)
        compared += length if first is None else first
    assert compared > 200
