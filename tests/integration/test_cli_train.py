"""`lmesh train`, jobs, adapters and export against a real gRPC server whose training service is scripted."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from lmesh.training.v1 import training_pb2
from lmesh_chassis.artifacts.folders import read_folder
from lmesh_cli import app
from lmesh_cli.mesh_link import MeshError
from lmesh_cli.training.artifact_link import MeshStore
from lmesh_cli.training.training_link import TrainingLink

from tests.scripted_jobs import (
    COMPLETED,
    FAILED,
    QUEUED,
    RUNNING,
    ScriptedTraining,
    served_training,
    state,
    step,
)

MIB = 1 << 20


class Done(NamedTuple):
    status: int
    out: str
    err: str


Lmesh = Callable[..., Done]


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[tuple[str, ScriptedTraining]]:
    with served_training(tmp_path / "mesh") as running:
        yield running


@pytest.fixture
def lmesh(mesh: tuple[str, ScriptedTraining], monkeypatch: pytest.MonkeyPatch, capfd) -> Lmesh:
    """The command, called as from a shell; the address goes last."""
    monkeypatch.setenv("COLUMNS", "200")

    def call(*args: str | Path) -> Done:
        monkeypatch.setattr("sys.argv", ["lmesh", *map(str, args), "--address", mesh[0]])
        with pytest.raises(SystemExit) as ended:
            app.main()
        captured = capfd.readouterr()
        return Done(int(ended.value.code or 0), captured.out, captured.err)

    return call


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "ahoy"}\n' * 200_000)  # more than three pieces
    return path


@pytest.fixture
def job(tmp_path: Path, rows: Path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text("{model: small, publish_as: mine, dataset: {source: rows.jsonl}, optimiser: {learning_rate: 5e-4}}")
    return path


class TestTrain:
    def test_from_a_file_to_a_published_adapter(self, mesh, lmesh: Lmesh, job: Path, rows: Path) -> None:
        _, service = mesh
        adapter = training_pb2.Adapter(name="mine", model="small", version=3)
        service.script.insert(-1, training_pb2.JobEvent(published=adapter))
        done = lmesh("train", "-c", job, "--rank", "4", "--job-id", "j1")
        assert done.status == 0, done.err
        digest = hashlib.sha256(rows.read_bytes()).hexdigest()
        assert service.store.path(digest).read_bytes() == rows.read_bytes()
        made = service.jobs["j1"]
        assert made.publish_as == "mine"
        assert made.spec.dataset.source == f"artifact:{digest}/rows.jsonl"
        assert (made.spec.lora.r, made.spec.optimiser.learning_rate) == (4, 5e-4)
        assert "trained tokens" in done.out and "user: hi[Ahoy.]" in done.out
        assert "step 4/4  loss 0.7500" in done.out
        assert "published: small:mine@3" in done.out
        assert 'lmesh chat small:mine -m "..."' in done.out

    @pytest.mark.parametrize(
        ("digest", "said"), [("", "lmesh up --model NAME=FOLDER"), ("d", "lmesh adapters publish")]
    )
    def test_what_to_do_with_what_it_made(self, mesh, lmesh: Lmesh, job: Path, digest: str, said: str) -> None:
        made = training_pb2.Made(artifact="a", adapter_digest=digest)
        mesh[1].script.insert(-1, training_pb2.JobEvent(made=made))
        job.write_text("{model: small, add_tokens: [<tide>], dataset: {source: rows.jsonl}}")
        done = lmesh("train", "-c", job, "--job-id", "j1")
        assert done.status == 0 and said in done.out, done.out
        assert ("--job j1 --format merged --out FOLDER" in done.out) is (not digest)
        assert mesh[1].jobs["j1"].spec.add_tokens == ["<tide>"]

    def test_dry_run_ends_before_the_job(self, mesh, lmesh: Lmesh, job: Path) -> None:
        done = lmesh("train", "-c", job, "--dry-run")
        assert (done.status, mesh[1].jobs) == (0, {})
        assert "updates" in done.out

    def test_detach_says_how_to_follow(self, mesh, lmesh: Lmesh, job: Path) -> None:
        done = lmesh("train", "-c", job, "--detach")
        (job_id,) = mesh[1].jobs
        assert job_id.startswith("mine-")
        assert done.status == 0
        assert f"lmesh jobs watch {job_id}" in done.out
        assert mesh[1].cursors == []

    def test_a_wrong_key_is_refused_before_anything_is_sent(self, mesh, lmesh: Lmesh, job: Path) -> None:
        job.write_text("{model: small, dataset: {source: rows.jsonl}, lora: {rank: 3}}")
        done = lmesh("train", "-c", job)
        assert (done.status, mesh[1].pieces) == (2, 0)
        assert "lora.rank: no such key" in done.err

    def test_what_the_mesh_refuses_is_told(self, lmesh: Lmesh, job: Path) -> None:
        job.write_text("{model: small, method: magic, dataset: {source: 'hub:o/n'}}")
        done = lmesh("train", "-c", job)
        assert done.status == 1
        assert "'magic' is neither lora nor full" in done.err

    def test_no_gateway(self, monkeypatch: pytest.MonkeyPatch, capfd, job: Path) -> None:
        arguments = ["lmesh", "train", "--model", "m", "--dataset", "hub:o/n", "--address", "127.0.0.1:1"]
        monkeypatch.setattr("sys.argv", arguments)
        with pytest.raises(SystemExit):
            app.main()
        assert "no gateway answers at 127.0.0.1:1" in capfd.readouterr().err


class TestWatch:
    def test_a_broken_stream_goes_on_after_the_last_event(self, mesh, lmesh: Lmesh, job: Path) -> None:
        _, service = mesh
        service.breaks = [2, 6]
        done = lmesh("train", "-c", job)
        assert done.status == 0
        assert service.cursors == [0, 2, 6]
        assert done.out.count("running") == 1

    def test_a_failed_job_fails_the_command(self, mesh, lmesh: Lmesh, job: Path) -> None:
        mesh[1].script = [state(QUEUED), state(RUNNING), step(1), state(FAILED, "OUT_OF_MEMORY", "needs 9 GiB")]
        done = lmesh("train", "-c", job, "--job-id", "j1")
        assert done.status == 1
        assert "failed: OUT_OF_MEMORY needs 9 GiB" in done.out
        assert "lmesh jobs resume j1" in done.out

    def test_a_resumed_job_has_ended_before(self, mesh, lmesh: Lmesh, job: Path) -> None:
        mesh[1].script = [state(QUEUED), state(FAILED, "X"), state(QUEUED), state(RUNNING), step(1), state(COMPLETED)]
        assert lmesh("train", "-c", job).status == 0

    def test_ctrl_c_leaves_the_job_alone(self, mesh, lmesh: Lmesh, job: Path, monkeypatch) -> None:
        def interrupted(self: TrainingLink, job_id: str) -> Iterator[None]:
            raise KeyboardInterrupt
            yield

        monkeypatch.setattr(TrainingLink, "watch", interrupted)
        done = lmesh("train", "-c", job, "--job-id", "j1")
        assert done.status == 130
        assert "the job goes on: j1" in done.out and "lmesh jobs stop j1" in done.out
        assert all(what == "validate" for what, _ in mesh[1].asked)

    def test_a_gateway_that_stays_away_is_given_up(self) -> None:
        with pytest.raises(MeshError, match="no gateway answers"):
            list(TrainingLink("127.0.0.1:1", lost_for_s=0.0).watch("j"))


class TestJobs:
    def test_list_show_and_wishes(self, mesh, lmesh: Lmesh, job: Path) -> None:
        lmesh("train", "-c", job, "--detach", "--job-id", "j1")
        listed = lmesh("jobs")
        assert listed.status == 0 and "j1" in listed.out and "queued" in listed.out
        assert '"learning_rate": 0.0005' in lmesh("jobs", "show", "j1").out
        for wish in ("stop", "cancel", "resume"):
            assert lmesh("jobs", wish, "j1").status == 0
        assert mesh[1].asked[-3:] == [("stop", "j1"), ("cancel", "j1"), ("resume", "j1")]
        assert lmesh("jobs", "watch", "j1").status == 0
        unknown = lmesh("jobs", "show", "j2")
        assert (unknown.status, "JOB_NOT_FOUND" in unknown.err) == (1, True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "adapter"
    (path / "more").mkdir(parents=True)
    (path / "adapter_config.json").write_text('{"r": 8}')
    (path / "more" / "adapter_model.bin").write_bytes(bytes(range(256)) * 8192)
    return path


class TestAdapters:
    def test_a_folder_is_uploaded_as_one(self, mesh, lmesh: Lmesh, folder: Path) -> None:
        _, service = mesh
        done = lmesh("adapters", "publish", "mine", "--folder", folder, "--model", "small")
        assert (done.status, done.out.strip()) == (0, "published small:mine@1"), done.err
        files = read_folder(service.store, service.adapters[0].artifact)
        for file in files:
            assert service.store.path(file.digest).read_bytes() == (folder / file.name).read_bytes()
        assert [file.name for file in files] == ["adapter_config.json", "more/adapter_model.bin"]

    def test_what_is_there_is_not_sent_again(self, mesh, lmesh: Lmesh, folder: Path) -> None:
        lmesh("adapters", "publish", "mine", "--folder", folder)
        sent = mesh[1].pieces
        assert lmesh("adapters", "publish", "mine", "--folder", folder).out.strip() == "published small:mine@2"
        assert mesh[1].pieces == sent

    def test_of_a_job_listed_and_deleted(self, mesh, lmesh: Lmesh) -> None:
        for _ in range(2):
            lmesh("adapters", "publish", "mine", "--job", "j1")
        listed = lmesh("adapters").out
        assert "small:mine@2" in listed and " 8 " in listed and "j1" in listed
        assert lmesh("adapters", "delete", "mine").out.strip() == "deleted small:mine"
        assert lmesh("adapters", "delete", "mine@1").out.strip() == "deleted small:mine@1"
        assert mesh[1].asked == [("delete", "small:mine@0"), ("delete", "small:mine@1")]
        assert "no adapter yours" in lmesh("adapters", "delete", "yours").err

    def test_one_source(self, lmesh: Lmesh, folder: Path) -> None:
        assert "either --job ID or --folder PATH" in lmesh("adapters", "publish", "mine").err
        assert lmesh("adapters", "publish", "mine", "--job", "j", "--folder", folder).status == 1
        assert "is no folder" in lmesh("adapters", "publish", "mine", "--folder", folder / "absent").err


class TestExport:
    def test_comes_whole_though_the_connection_breaks(self, mesh, lmesh: Lmesh, tmp_path: Path) -> None:
        _, service = mesh
        lmesh("adapters", "publish", "mine", "--job", "j1")
        service.breaks = [0, 0, 0]
        out = tmp_path / "out"
        done = lmesh("export", "--adapter", "small:mine@1", "--format", "merged", "--dtype", "f16", "--out", out)
        assert done.status == 0, done.err
        assert (out / "sub" / "weights.bin").read_bytes() == bytes(range(256)) * 10_000
        assert (out / "adapter_config.json").read_text() == "{}"
        asked = service.exported[0]
        assert (asked.format, asked.dtype, asked.adapter_digest) == ("merged", "f16", f"{1:064x}")
        assert "99.87%" in done.out

    def test_nothing_is_written_over(self, lmesh: Lmesh, tmp_path: Path, folder: Path) -> None:
        done = lmesh("export", "--job", "j1", "--out", folder)
        assert (done.status, "is there already" in done.err) == (1, True)
        empty = tmp_path / "empty"
        empty.mkdir()
        assert lmesh("export", "--job", "j1", "--out", empty).status == 0
        assert (empty / "adapter_config.json").exists()

    def test_a_changed_file_is_found_out(self, mesh, lmesh: Lmesh, tmp_path: Path) -> None:
        service = mesh[1]
        lmesh("export", "--job", "j1", "--out", tmp_path / "first")
        changed = hashlib.sha256(b"{}").hexdigest()
        service.store.path(changed).write_bytes(b"[]")
        done = lmesh("export", "--job", "j1", "--out", tmp_path / "second")
        assert (done.status, "is not what was stored" in done.err) == (1, True)
        assert not (tmp_path / "second").exists()


class TestUpload:
    def test_a_broken_one_goes_on_where_it_was(self, mesh, rows: Path) -> None:
        address, service = mesh
        service.break_upload_after = 2
        seen: list[int] = []
        with rows.open("rb") as file:
            digest = MeshStore(address, lambda name, at, size: seen.append(at)).put(file)
        assert service.store.path(digest).stat().st_size == rows.stat().st_size
        assert service.pieces == -(-rows.stat().st_size // MIB)  # none twice
        assert seen[-1] == rows.stat().st_size

    def test_an_empty_file_is_refused_here(self, lmesh: Lmesh, job: Path, rows: Path) -> None:
        rows.write_bytes(b"")
        done = lmesh("train", "-c", job)
        assert (done.status, "rows.jsonl is empty" in done.err) == (1, True)
