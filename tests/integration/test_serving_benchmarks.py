"""The serving benchmarks from end to end on a tiny shape: what they print is whole, and everything finishes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SMALL = {"LMESH_WORKER_THREADS": "1", "LMESH_WORKER_KV_CACHE_BYTES": "64MiB", "LMESH_WORKER_DEVICE": "cpu"}


def lines(script: str, *args: str, **env: str) -> tuple[list[dict[str, Any]], str]:
    command = [sys.executable, str(BENCHMARKS / script), *args]
    done = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")], done.stdout


def test_the_engine_alone() -> None:
    settings = ["--set", "device=cpu", "threads=1", "kv_blocks=256", "max_model_len=1024"]
    found, text = lines(
        "serve_offline.py",
        *("--model", "tiny", "--workload", "4x40+6", "1x20+8", "--runs", "2", "--cold", "--profile", "2"),
        *("--transformers", "--peer-batch", "3", *settings),
    )
    many, one, profile, peer = found
    assert (many["system"], many["workload"], many["runs"], many["model"]) == ("engine", "4x40+6", 2, "tiny")
    for line in (many, one):
        assert line["kernel_cache"] == "empty" and line["startup_s"] > 0
        assert 0 < line["floor_s"] < line["wall_s"] and 0 < line["floor_share"] < 1
        assert line["copy_tb_s"] > 0 and line["matmul_tflop_s"] > 0
        assert line["tok_s_min"] <= line["tok_s"] <= line["tok_s_max"]
        assert 0 < line["ttft_s"] <= line["wall_s"]
    assert profile["profile"] == "decode x 2" and profile["step_us"] > 0
    assert "aten::" in text and "us/step" in text
    assert (peer["system"], peer["workload"]) == ("transformers", "4x40+6") and peer["tok_s"] > 0
    assert abs(peer["engine_times"] - many["tok_s"] / peer["tok_s"]) < 0.01


def test_a_checkpoint_and_its_twin(tmp_path: Path, monkeypatch: Any) -> None:
    """transformers' model has the decoder's weights: greedy ids are the same."""
    import torch
    from lmesh_kernels.text.resolve import local_files
    from lmesh_worker.engine.config import EngineConfig
    from lmesh_worker.engine.engine import Engine
    from lmesh_worker.messages import Params, Start

    from tests.tiny_model import save_tiny_llama

    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from transformers_peer import twin_of

    files = local_files(save_tiny_llama(tmp_path))
    engine = Engine(EngineConfig(device="cpu", threads=1, kv_blocks=64, max_model_len=128), files)
    ids = engine.generate([Start(1, "r", 0, [5, 9, 13], 3, Params(max_tokens=12))])[1]
    twin = twin_of(engine.decoder, tmp_path)
    twin.generation_config.eos_token_id = None
    out = twin.generate(torch.tensor([[5, 9, 13]]), do_sample=False, max_new_tokens=12, pad_token_id=0)
    assert out[0, 3:].tolist() == ids
    engine.close()


def test_the_whole_mesh() -> None:
    found, _ = lines(
        "serve_online.py",
        *("--model", "tiny", "--streams", "1", "12", "--rate", "6", "--duration", "2", "--prompt", "24", "--new", "8"),
        *("--runs", "1", "--rounds", "2", "--gateways", "2", "--clients", "2"),
        **SMALL,
    )
    one, many, random = found
    assert [line["workload"] for line in found] == ["1 streams 24+8", "12 streams 24+8", "6 a second 24+8"]
    assert (one["requests"], many["requests"]) == (8, 24)
    for line in found:
        assert line["failed"] == 0 and line["tok_s"] > 0 and line["gateways"] == line["clients"] == 2
        assert 0 < line["ttft_ms_p50"] <= line["ttft_ms_p90"] <= line["ttft_ms_p99"]
        assert line["itl_ms_p50"] > 0 and line["token_ms_p50"] > 0
    assert 0 < one["mesh_ttft_ms_p50"] < one["ttft_ms_p99"]
    assert "mesh_ttft_ms_p50" not in many and random["requests"] > 0


def test_how_right_lower_precision_is(tmp_path: Path) -> None:
    from tests.tiny_model import save_tiny_llama

    (found,), _ = lines("accuracy.py", "--model", "tiny", "--positions", "512", "--device", "cpu")
    assert (found["dtype"], found["positions"], found["agreed_share"]) == ("bfloat16", 512, 1.0)
    assert found["sure_share"] >= 0.6 and found["wrong_beyond_doubt"] == 0 and 0.5 < found["error_ratio"] <= 1.05
    text = tmp_path / "text"
    text.write_text("what a text says, and says again: " * 20)
    told = ("--path", str(save_tiny_llama(tmp_path / "model")), "--text", str(text), "--device", "cpu")
    (same,), _ = lines("accuracy.py", *told, "--dtype", "float32")
    assert same["apart"] == 0.0 and same["perplexity"] > 1
