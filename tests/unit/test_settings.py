"""Settings refuse whatever they would otherwise have to guess at."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
from lmesh_chassis.settings import ChassisSettings, SettingsError, load, load_or_exit, parse_bytes, parse_seconds


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample(ChassisSettings):
    name: str
    port: int = 1
    ratio: float = 0.5
    cached: bool = True
    folder: Path = Path("a")
    kinds: tuple[str, ...] = ()
    mode: Literal["auto", "cpu"] = "auto"
    wait_s: float = 1.0
    body_bytes: int = 1
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.port > 65535:
            raise ValueError(f"port must be at most 65535, not {self.port}")


def sample(**values: str) -> Sample:
    return load(Sample, service="sample", environ={"LMESH_SAMPLE_NAME": "n", "LMESH_OTHER_X": "1", **values})


def test_every_type_is_read() -> None:
    got = sample(
        LMESH_SAMPLE_PORT="8000",
        LMESH_SAMPLE_RATIO="0.25",
        LMESH_SAMPLE_CACHED="off",
        LMESH_SAMPLE_FOLDER="/x/y",
        LMESH_SAMPLE_KINDS="a, b,",
        LMESH_SAMPLE_MODE="cpu",
        LMESH_SAMPLE_WAIT_S="500ms",
        LMESH_SAMPLE_BODY_BYTES="8MiB",
        LMESH_SAMPLE_LIMIT="7",
        LMESH_SAMPLE_LOG_LEVEL="debug",
    )
    assert got == Sample(
        name="n",
        port=8000,
        ratio=0.25,
        cached=False,
        folder=Path("/x/y"),
        kinds=("a", "b"),
        mode="cpu",
        wait_s=0.5,
        body_bytes=8 * 2**20,
        limit=7,
        log_level="debug",
    )


def test_defaults_hold_and_an_empty_optional_is_none() -> None:
    assert sample(LMESH_SAMPLE_LIMIT="") == Sample(name="n")


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("LMESH_SAMPLE_CACHED", "ture"),
        ("LMESH_SAMPLE_PORT", "80.5"),
        ("LMESH_SAMPLE_PORT", ""),
        ("LMESH_SAMPLE_RATIO", "nan"),
        ("LMESH_SAMPLE_WAIT_S", "5 parsecs"),
        ("LMESH_SAMPLE_WAIT_S", "-1"),
        ("LMESH_SAMPLE_BODY_BYTES", "8MiBs"),
        ("LMESH_SAMPLE_MODE", "gpu"),
        ("LMESH_SAMPLE_POTR", "1"),
    ],
)
def test_a_bad_variable_is_named(variable: str, value: str) -> None:
    with pytest.raises(SettingsError) as caught:
        sample(**{variable: value})
    assert caught.value.variable == variable
    assert variable in str(caught.value)


def test_a_missing_variable_is_named() -> None:
    with pytest.raises(SettingsError, match="LMESH_SAMPLE_NAME: must be set"):
        load(Sample, service="sample", environ={})


def test_the_dataclass_own_checks_are_settings_errors() -> None:
    with pytest.raises(SettingsError, match="port must be at most 65535"):
        sample(LMESH_SAMPLE_PORT="70000")


def test_a_bad_environment_ends_the_process_with_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LMESH_SAMPLE_NAME", "n")
    monkeypatch.setenv("LMESH_SAMPLE_PORT", "many")
    with pytest.raises(SystemExit) as caught:
        load_or_exit(Sample, service="sample")
    assert caught.value.code == 2
    assert capsys.readouterr().err == "lmesh sample: LMESH_SAMPLE_PORT: 'many' is not a whole number\n"


@pytest.mark.parametrize(("text", "want"), [("1024", 1024), ("1KiB", 1024), ("1.5kb", 1500), ("2GiB", 2**31)])
def test_bytes(text: str, want: int) -> None:
    assert parse_bytes(text) == want


@pytest.mark.parametrize(
    ("text", "want"), [("30", 30.0), ("250ms", 0.25), ("2m", 120.0), ("2min", 120.0), ("1h", 3600.0)]
)
def test_seconds(text: str, want: float) -> None:
    assert parse_seconds(text) == pytest.approx(want)
