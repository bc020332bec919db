"""Job files: read strictly, flags over them, and what is wrong named by its key."""

from __future__ import annotations

from pathlib import Path

import pytest
from lmesh.training.v1 import training_pb2
from lmesh_cli.training.adapter_name import AdapterName, AdapterNameError
from lmesh_cli.training.job_file import JobFile, JobFileError, read_job
from lmesh_cli.training.records import Adapter
from lmesh_cli.training.spec_link import job_spec, known_keys

from tests.contract.sources import ROOT, table

FULL = """
model: small
publish_as: mine
dataset: {source: rows.jsonl, eval_rows: 4, ignore_columns: [id]}
lora: {r: 8, target_modules: all-linear, rank_pattern: {q_proj: 4}, alpha_pattern: {q_proj: 8}}
optimiser: {learning_rate: 2e-4, warmup_steps: 3}
epochs: 2
load_in_4bit: true
"""


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "x"}\n')
    return path


def read(tmp_path: Path, text: str, **flags: object) -> JobFile:
    file = tmp_path / "job.yaml"
    file.write_text(text)
    return read_job(file, flags)


def spec(tmp_path: Path, text: str, **flags: object) -> training_pb2.JobSpec:
    return job_spec(read(tmp_path, text, **flags).values)


class TestReading:
    def test_every_kind_of_value(self, tmp_path: Path, rows: Path) -> None:
        job = read(tmp_path, FULL)
        made = job_spec(job.values)
        assert (job.publish_as, job.dataset) == ("mine", rows)
        assert made.optimiser.learning_rate == 2e-4  # YAML 1.1 would take it for a text
        assert (made.epochs, made.load_in_4bit, made.lora.r) == (2.0, True, 8)
        assert list(made.lora.target_modules) == ["all-linear"]
        assert (dict(made.lora.rank_pattern), dict(made.lora.alpha_pattern)) == ({"q_proj": 4}, {"q_proj": 8.0})
        assert list(made.dataset.ignore_columns) == ["id"]

    def test_what_is_not_said_is_not_sent(self, tmp_path: Path) -> None:
        made = spec(tmp_path, "{model: small, dataset: {source: 'hub:o/n'}}")
        assert not made.HasField("epochs") and not made.HasField("lora") and not made.HasField("optimiser")

    def test_flags_go_before_the_file(self, tmp_path: Path, rows: Path) -> None:
        flags = {"model": "other", "lora.r": 4, "optimiser.learning_rate": 1e-3, "publish_as": "theirs"}
        job = read(tmp_path, FULL, **flags, epochs=None)
        made = job_spec(job.values)
        assert (made.model, made.lora.r, made.optimiser.learning_rate, made.epochs) == ("other", 4, 1e-3, 2.0)
        assert (made.optimiser.warmup_steps, job.publish_as) == (3, "theirs")

    def test_a_stream(self, tmp_path: Path, rows: Path) -> None:
        told = "{source: rows.jsonl, streaming: true, shuffle_buffer_size: 64}"
        made = job_spec(read(tmp_path, f"model: m\nmax_steps: 5\ndataset: {told}\n").values).dataset
        assert made.streaming and made.shuffle_buffer_size == 64
        with pytest.raises(JobFileError, match=r"did you mean dataset.shuffle_buffer_size\?"):
            job_spec(read(tmp_path, "model: m\ndataset: {source: rows.jsonl, shuffle_buffer: 64}\n").values)

    def test_flags_alone(self, rows: Path) -> None:
        job = read_job(None, {"model": "small", "dataset.source": str(rows), "lora.r": 2})
        assert (job_spec(job.values).lora.r, job.dataset) == (2, rows)

    def test_a_files_path_counts_from_the_file_and_a_flags_from_here(
        self, tmp_path: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        (elsewhere / "own.jsonl").write_text("{}")
        monkeypatch.chdir(elsewhere)
        assert read(tmp_path, FULL).dataset == rows
        assert read(tmp_path, FULL, **{"dataset.source": "own.jsonl"}).dataset == Path("own.jsonl")

    @pytest.mark.parametrize("source", ["hub:owner/name", f"artifact:{'0' * 64}/rows.jsonl"])
    def test_what_the_mesh_finds_itself_is_not_looked_for(self, tmp_path: Path, source: str) -> None:
        job = read(tmp_path, f"{{model: m, dataset: {{source: '{source}'}}}}")
        assert job.dataset is None
        assert job_spec(job.values).dataset.source == source

    def test_the_trainers_settings_are_all_here(self) -> None:
        from lmesh_trainer.spec import DatasetSpec, JobSpec, LoraSpec, OptimiserSpec

        parts = {"dataset.": DatasetSpec, "lora.": LoraSpec, "optimiser.": OptimiserSpec, "": JobSpec}
        own = {f"{prefix}{name}" for prefix, kind in parts.items() for name in kind.__struct_fields__}
        assert own - known_keys() == {"device", "threads", "world"}  # the trainer's, not the client's

    def test_the_page_lists_every_key(self) -> None:
        rows = table(ROOT / "docs/training.md", "Settings")
        listed = {key.strip("` ") for row in rows for key in row[0].split(",")}
        sections = {"dataset", "lora", "optimiser"}
        assert listed - {"publish_as"} == known_keys() - sections


class TestRefusals:
    @pytest.mark.parametrize(
        ("line", "said"),
        [
            ("epoch: 2", r"^epoch: no such key; did you mean epochs\?"),
            ("learning_rate: 1", r"^learning_rate: no such key; did you mean optimiser.learning_rate\?"),
            ("lora: {rank: 4}", r"^lora.rank: no such key"),
            ("whatever: 2", r"^whatever: no such key; there are model, dataset"),
            ("epochs: two", r"^epochs: must be a number, not the text 'two'"),
            ("epochs: true", r"^epochs: must be a number, not True"),
            ("epochs: .nan", r"^epochs: must be a number"),
            ("max_steps: 1.5", r"^max_steps: must be a whole number, 0 or more, not 1.5"),
            ("max_steps: -1", r"^max_steps: must be a whole number"),
            ("load_in_4bit: 1", r"^load_in_4bit: must be true or false, not 1"),
            ("method: 3", r"^method: must be a text, not 3"),
            ("seed:", r"^seed: must be a whole number.* not nothing: leave the key out"),
            ("lora: 8", r"^lora: must be a mapping of keys, not 8"),
            ("lora: {layers_to_transform: 3}", r"^lora.layers_to_transform: must be a list, not 3"),
            ("lora: {layers_to_transform: [1, x]}", r"^lora.layers_to_transform\[1\]: must be a whole number"),
            ("lora: {rank_pattern: {q: a}}", r"^lora.rank_pattern.q: must be a whole number"),
            ("lora: {start: ./folder}", r"^lora.start: must be a published adapter's digest"),
            ("publish_as: 3", r"^publish_as: must be a text"),
            ("seed: 1\nseed: 2", r"seed is given twice"),
        ],
    )
    def test_the_key_is_named(self, tmp_path: Path, line: str, said: str) -> None:
        with pytest.raises(JobFileError, match=said):
            spec(tmp_path, f"model: m\ndataset: {{source: 'hub:o/n'}}\n{line}\n")

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("", "^model: say which one"),
            ("model: m", "^dataset.source: say what"),
            ("{model: m, dataset: {}}", "^dataset.source: say what"),
            ("{model: m, dataset: rows.jsonl}", "^dataset: must be a mapping of keys"),
            ("{model: m, dataset: {source: nowhere.jsonl}}", r"^dataset.source: .*nowhere.jsonl is no file"),
            ("{model: m, dataset: {source: .}}", r"^dataset.source: .* is a folder"),
            ("- a list", "must hold keys"),
            ("{", "no YAML"),
        ],
    )
    def test_what_is_missing(self, tmp_path: Path, text: str, said: str) -> None:
        with pytest.raises(JobFileError, match=said):
            spec(tmp_path, text)

    def test_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(JobFileError, match="cannot be read"):
            read_job(tmp_path / "absent.yaml", {})


class TestAdapterName:
    def test_forms(self) -> None:
        assert AdapterName.read("a") == AdapterName(model="", name="a", version=0)
        assert AdapterName.read("m/x:a.b@12") == AdapterName(model="m/x", name="a.b", version=12)
        assert str(AdapterName.read("a@2", "m")) == "m:a@2"

    @pytest.mark.parametrize("text", ["", "a b", "a@0", "a@x", ":a", "m:", "a@1@2"])
    def test_what_is_none(self, text: str) -> None:
        with pytest.raises(AdapterNameError):
            AdapterName.read(text)

    def test_another_model_than_said(self) -> None:
        with pytest.raises(AdapterNameError, match="another model"):
            AdapterName.read("m:a", "n")

    def test_pick(self) -> None:
        known = [adapter("m", "a", 1), adapter("m", "a", 2), adapter("n", "b", 1), adapter("m", "b", 1)]
        assert AdapterName.read("a").pick(known).version == 2
        assert AdapterName.read("a@1").pick(known).version == 1
        assert AdapterName.read("n:b").pick(known).model == "n"
        with pytest.raises(AdapterNameError, match="m:b, n:b"):
            AdapterName.read("b").pick(known)
        with pytest.raises(AdapterNameError, match="no adapter a@3"):
            AdapterName.read("a@3").pick(known)


def adapter(model: str, name: str, version: int) -> Adapter:
    return Adapter(
        model=model,
        name=name,
        version=version,
        digest="d",
        artifact="",
        job_id="",
        workers=0,
        created=None,
        rank=None,
    )
