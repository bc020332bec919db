"""What the benchmarks compute from what they measure: workloads, floors, latencies, and the results file."""

from __future__ import annotations

import csv
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports one of the scripts' modules, which lie beside each other and in no package."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def imported(name: str) -> ModuleType:
        import importlib

        return importlib.import_module(name)

    return imported


class TestWorkloads:
    @pytest.mark.parametrize(
        ("name", "count", "tokens_in", "tokens_out"),
        [
            ("W1", 1, 128, 128),
            ("W2", 32, 4_608, 4_608),
            ("W3", 32, 17_408, 1_024),
            ("G1", 256, 144_831, 144_160),
            ("G2", 1, 512, 256),
            ("G3", 64, 64 * (4096 + 128), 4_096),
            ("G4", 8, 65_536, 128),
            ("3x5+7", 3, 15, 21),
        ],
    )
    def test_lengths_are_fixed_and_ids_are_not(
        self, load: Any, name: str, count: int, tokens_in: int, tokens_out: int
    ) -> None:
        make = load("workloads").make
        first, second = make(name, 1), make(name, 2)
        assert len(first) == count
        assert (sum(len(job.prompt) for job in first), sum(job.new_tokens for job in first)) == (tokens_in, tokens_out)
        assert [(len(j.prompt), j.new_tokens) for j in first] == [(len(j.prompt), j.new_tokens) for j in second]
        assert all(a.prompt != b.prompt for a, b in zip(first, second, strict=True))
        assert make(name, 1) == first

    def test_ids_stay_in_a_small_vocabulary(self, load: Any) -> None:
        jobs = load("workloads").make("G3", 0, vocab=512)
        assert max(max(job.prompt) for job in jobs) < 512
        assert len({job.prompt[:4096] for job in jobs}) == 1

    def test_unknown_names_are_refused(self, load: Any) -> None:
        with pytest.raises(ValueError, match=r"'G9'.*G1.*64x512"):
            load("workloads").make("G9", 0)


class TestFloor:
    @pytest.mark.parametrize(("name", "gigabytes"), [("llama-1b", 2.47), ("llama-8b", 15.0), ("qwen3-0.6b", 1.19)])
    def test_weights_of_the_shapes(self, load: Any, name: str, gigabytes: float) -> None:
        from lmesh_kernels.models.hf_config import config_from_dict

        model = config_from_dict(load("shapes").SHAPES[name])
        assert load("floor").weight_bytes(model, torch.bfloat16) / 1e9 == pytest.approx(gigabytes, rel=0.01)

    def test_of_one_stream_is_reading_the_weights(self, load: Any) -> None:
        from lmesh_kernels.models.hf_config import config_from_dict

        model = config_from_dict(load("shapes").SHAPES["llama-1b"])
        work = load("floor").least_work(model, load("workloads").make("G2", 0), torch.bfloat16)
        card = load("card").Card("h", 3.02, 798.0)
        assert 256 / work.seconds(card) == pytest.approx(1_230, rel=0.02)

    def test_a_shared_prefix_counts_once(self, load: Any) -> None:
        from lmesh_kernels.models.hf_config import config_from_dict

        floor, job = load("floor"), load("workloads").Job
        model = config_from_dict(load("shapes").SHAPES["tiny"])
        prefix = tuple(range(100))
        alike = [job((*prefix, 200 + i), 4) for i in range(3)]
        apart = [job((200 + i, *prefix), 4) for i in range(3)]
        together, each = (floor.least_work(model, jobs, torch.float32) for jobs in (alike, apart))
        assert each.operations - together.operations >= 2 * 200 * floor._layer_weights(model)
        kv_token = 2 * 2 * 32 * 4
        assert each.bytes_moved - together.bytes_moved == 200 * 3 * kv_token


class TestFigures:
    def test_of_a_run(self, load: Any) -> None:
        online, seen = load("online_figures"), load("load_client").Seen
        goal = online.Goal(ttft_s=0.5, token_s=0.1)
        run = [
            seen(begin=10.0, first=10.2, end=10.45, tokens=4, gaps=[0.1] * 3, engine_s=0.15),
            seen(begin=10.0, first=11.0, end=12.0, tokens=6, gaps=[0.2] * 5, engine_s=0.8),
            seen(begin=10.0, end=10.1, error="UNAVAILABLE: gone"),
        ]
        found = online.figures(run, goal)
        assert (found["requests"], found["failed"]) == (3, 1)
        assert found["wall_s"] == pytest.approx(2.0) and found["tok_s"] == pytest.approx(5.0)
        assert found["ttft_s"] == pytest.approx(0.6) and found["ttft_ms_p99"] == pytest.approx(1000)
        assert found["goodput_req_s"] == pytest.approx(0.5) and found["good_share"] == pytest.approx(1 / 3)
        assert found["itl_ms_p50"] == pytest.approx(200) and found["token_ms_p99"] == pytest.approx(200)
        assert found["mesh_ttft_ms_p50"] == pytest.approx(200)

    def test_over_runs(self, load: Any) -> None:
        online = load("online_figures")
        runs = [{"tok_s": rate, "requests": 4, "failed": fault} for rate, fault in ((1.0, 0), (5.0, 1), (3.0, 0))]
        line = online.over_runs(runs)
        assert (line["tok_s"], line["tok_s_min"], line["tok_s_max"]) == (3.0, 1.0, 5.0)
        assert (line["requests"], line["failed"]) == (12, 1)
        assert online.over_runs([{"requests": 2, "failed": 2}])["failed"] == 2

    def test_a_profile_has_what_the_device_does_after_the_host_is_done(self, load: Any) -> None:
        profile = load("step_profile")
        cpu, device = torch.autograd.DeviceType.CPU, torch.autograd.DeviceType.CUDA

        def event(name: str, where: Any, start: float) -> SimpleNamespace:
            return SimpleNamespace(name=name, device_type=where, time_range=SimpleNamespace(start=start, end=start + 1))

        region = event(profile._REGION, cpu, 10)
        region.time_range.end = 20
        shown = event(profile._REGION, device, 10)
        mine = [event("launch", cpu, 12), event("kernel", device, 15), event("last kernel", device, 25)]
        others = [event("launch", cpu, 5), event("kernel", device, 9), event("cudaDeviceSynchronize", cpu, 21)]
        assert profile._steady([*others, region, shown, *mine]) == mine

    def test_overlapping_kernels_are_busy_once(self, load: Any) -> None:
        covered = load("step_profile")._covered
        assert covered([(0, 4), (2, 5), (7, 9), (7, 8)]) == 7
        assert covered([]) == 0


class TestResultsFile:
    def test_rows_are_added_and_replaced(self, load: Any, tmp_path: Path) -> None:
        results = load("results_file")
        row = {"system": "engine", "workload": "G1", "model": "m", "tok_s": 1}
        results.record("d", [row, {**row, "workload": "G2"}], tmp_path)
        path = results.record("d", [{**row, "tok_s": 2, "floor_share": 0.5}], tmp_path)
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert [(r["workload"], r["tok_s"], r["floor_share"]) for r in rows] == [("G2", "1", ""), ("G1", "2", "0.5")]
        assert tuple(rows[0])[: len(results.FIELDS)] == results.FIELDS

    def test_device_names(self, load: Any) -> None:
        assert load("results_file").file_name("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


def test_every_made_up_token_has_text(load: Any) -> None:
    from lmesh_kernels.text.tokenizer import TextTokenizer

    made = load("shapes").made_up_tokenizer(2_000)
    tokenizer = TextTokenizer(made, special_tokens={}, eos_ids=(), chat_template=None, add_bos=False)
    assert tokenizer.vocab_size == 2_000
    assert all(tokenizer.token_bytes(i) for i in range(2_000))
