"""Platforms: found or refused by name, steps run in order, memory as the tightest cgroup allows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lmesh_kernels.platforms import PlatformError, available, detect, host_memory


def test_cpu_is_always_there() -> None:
    platform = detect("cpu", threads=2)
    info = platform.describe()
    assert (platform.name, info.kind, platform.device.type) == ("cpu", "cpu", "cpu")
    assert 0 < info.free_bytes <= info.total_bytes
    assert platform.default_dtype() == torch.float32
    assert "threads=2" in info.notes
    assert available()[-1] == "cpu"
    assert detect("auto").name == available()[0]


def test_what_is_not_there_is_refused_by_name() -> None:
    with pytest.raises(PlatformError, match="'tpu' is unknown"):
        detect("tpu")
    for name in {"cuda", "rocm", "xpu"} - set(available()):
        with pytest.raises(PlatformError, match=f"'{name}' is not usable here"):
            detect(name)


def test_each_rank_of_a_machine_takes_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr("lmesh_kernels.platforms.cuda.CudaPlatform", lambda index: opened.append(index) or index)
    detect("cuda")
    monkeypatch.setenv("LOCAL_RANK", "1")
    detect("cuda")
    assert opened == [0, 1]
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(PlatformError, match="rank 2"):
        detect("cuda")


def test_a_cpu_stream_runs_in_order_and_in_place() -> None:
    platform = detect("cpu", threads=2)
    stream = platform.stream()
    order: list[str] = []
    one = stream.submit(lambda: order.append("first") or "one")
    two = stream.submit(lambda: order.append("second") or "two")
    assert not platform.overlaps
    assert order == ["first", "second"]
    assert (one.done(), one.result(), two.result()) == (True, "one", "two")
    stream.close()


def test_a_streams_errors_come_with_the_result() -> None:
    stream = detect("cpu", threads=2).stream()

    def fail() -> None:
        raise ZeroDivisionError("in the step")

    failed, after = stream.submit(fail), stream.submit(lambda: 5)
    with pytest.raises(ZeroDivisionError, match="in the step"):
        failed.result()
    assert after.result() == 5
    stream.close()


def test_staging_is_zeroed() -> None:
    staging = detect("cpu").staging((3, 2), torch.int32)
    assert (staging.shape, staging.dtype) == ((3, 2), torch.int32)
    assert not staging.any()


def test_the_peak_follows_what_is_held() -> None:
    platform = detect("cpu")
    platform.reset_peak()
    block = torch.ones(64 << 20, dtype=torch.uint8)
    held = platform.peak_bytes()
    assert held >= block.nbytes
    del block
    # Given back, it still counts (the kernel sums its counters lazily, hence the megabyte).
    assert platform.peak_bytes() >= held - (1 << 20)


def lay_cgroups(root: Path, monkeypatch: pytest.MonkeyPatch, own: str, files: dict[str, str]) -> None:
    """A machine of 1000 MB, 800 free, with the given cgroup tree."""
    proc, cgroup = root / "proc", root / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 1000000 kB\nMemFree: 1 kB\nMemAvailable: 800000 kB\n")
    (proc / "self" / "cgroup").write_text(own)
    for name, text in files.items():
        (cgroup / name).parent.mkdir(parents=True, exist_ok=True)
        (cgroup / name).write_text(text)
    monkeypatch.setattr(host_memory, "PROC", proc)
    monkeypatch.setattr(host_memory, "CGROUP", cgroup)


def test_memory_without_limits_is_the_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lay_cgroups(tmp_path, monkeypatch, "0::/\n", {"memory.max": "max\n", "memory.current": "5\n"})
    assert host_memory.host_memory() == (1000000 * 1024, 800000 * 1024)


def test_the_tightest_cgroup_above_the_process_binds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lay_cgroups(tmp_path, monkeypatch, "0::/a/b\n", {
        "a/b/memory.max": "500000000\n",
        "a/b/memory.current": "100000000\n",
        "a/memory.max": "300000000\n",
        "a/memory.current": "250000000\n",
        "a/memory.stat": "anon 1\ninactive_file 20000000\n",
        "other/memory.max": "1\n",
        "other/memory.current": "1\n",
    })  # fmt: skip
    assert host_memory.host_memory() == (300000000, 70000000)


def test_version_one_cgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lay_cgroups(tmp_path, monkeypatch, "4:memory:/job\n2:cpu,cpuacct:/job\n", {
        "memory/job/memory.limit_in_bytes": "400000000\n",
        "memory/job/memory.usage_in_bytes": "100000000\n",
        "memory/job/memory.stat": "total_inactive_file 50000000\n",
        "cpu/job/cpu.cfs_quota_us": "50000\n",
        "cpu/job/cpu.cfs_period_us": "100000\n",
    })  # fmt: skip
    assert host_memory.host_memory() == (400000000, 350000000)
    assert host_memory.usable_cores() == 1


def test_a_cpu_quota_bounds_the_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unlimited = host_memory.usable_cores()
    lay_cgroups(tmp_path, monkeypatch, "0::/a\n", {"a/cpu.max": "100000 100000\n"})
    assert host_memory.usable_cores() == 1 <= unlimited
