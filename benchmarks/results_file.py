"""Figures kept under benchmarks/results, one CSV file a device."""

from __future__ import annotations

import csv
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
# The columns that every row has; others follow in the order in which they came.
FIELDS = ("system", "workload", "tok_s", "tok_s_min", "tok_s_max", "wall_s", "ttft_s", "runs", "model", "version")
_SAME = ("system", "workload", "model")


def file_name(device: str) -> str:
    """A device's name as a file name, such as nvidia-h100-80gb-hbm3."""
    return "-".join("".join(c if c.isalnum() or c in ".-" else " " for c in device.lower()).split())


def cpu_name() -> str:
    """This machine's processor as a file name, such as cpu-amd-epyc-2-threads."""
    model, known = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    for line in known.read_text().splitlines() if known.exists() else ():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    return f"cpu-{file_name(model)}-{os.cpu_count()}-threads"


def record(name: str, rows: Sequence[dict[str, Any]], folder: Path = RESULTS) -> Path:
    """Adds rows to <folder>/<name>.csv; a row of the same system, workload and model is replaced. The file's path."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.csv"
    kept = [row for row in _read(path) if all(_key(row) != _key(new) for new in rows)]
    merged = [*kept, *rows]
    fields = list(dict.fromkeys([*FIELDS, *(field for row in merged for field in row)]))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(merged)
    return path


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _key(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(str(row.get(name, "")) for name in _SAME)
