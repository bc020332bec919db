"""The shape of a local mesh: models, ports, and how workers share a machine."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest
from lmesh_cli import log_files, ports, services
from lmesh_cli.devices import gpus_for_trainers, share_of_machine, visible_gpus
from lmesh_cli.launch import UpRequest
from lmesh_cli.plan import MeshPlan, ModelChoice, PlanError, derived_id, lay_out, parse_models
from lmesh_cli.ports import PortTakenError

SMALL = ModelChoice(id="small", asked="./small", source="/models/small")
BIG = ModelChoice(id="big", asked="hub:o/big", source="hub:o/big@1")
ARTIFACTS = Path("/run/mesh/artifacts")


def free_port() -> int:
    return ports.pick(1)[0]


def plan(*models: ModelChoice, workers: int = 1, gateways: int = 1, trainers: int = 0) -> MeshPlan:
    http, grpc = ports.pick(2)
    return lay_out(models, workers=workers, trainers=trainers, gateways=gateways, http_port=http, grpc_port=grpc)


def built(made: MeshPlan, env: dict[str, str]) -> dict[str, services.ServiceSpec]:
    return {spec.name: spec for spec in services.build(made, None, env, artifacts=ARTIFACTS)}


class TestModels:
    def test_default_is_the_small_one(self) -> None:
        assert parse_models([]) == {"smollm2-135m-instruct": "smollm2-135m-instruct"}

    @pytest.mark.parametrize(
        ("source", "wanted"),
        [
            ("hub:HuggingFaceTB/SmolLM2-135M-Instruct@main", "smollm2-135m-instruct"),
            ("./models/Qwen3-0.6B/", "qwen3-0.6b"),
            ("/data/tiny.Q4_1.gguf", "tiny.q4_1"),
            ("packaged:smollm2-135m-instruct", "smollm2-135m-instruct"),
        ],
    )
    def test_id_is_derived_as_the_worker_derives_it(self, source: str, wanted: str) -> None:
        from lmesh_worker.config import model_id_of

        assert derived_id(source) == model_id_of(source) == wanted

    @pytest.mark.parametrize("option", ["=x", "a=", "a b=x", "-a=x"])
    def test_malformed_is_refused(self, option: str) -> None:
        with pytest.raises(PlanError, match="id=source"):
            parse_models([option])

    def test_one_id_twice_is_refused(self) -> None:
        with pytest.raises(PlanError, match="twice"):
            parse_models(["a=x", "a=y"])


class TestPorts:
    def test_taken_port_is_named_with_its_option(self) -> None:
        with socket.socket() as holder:
            holder.bind((ports.HOST, 0))
            holder.listen()
            port = holder.getsockname()[1]
            with pytest.raises(PortTakenError, match=rf"port {port}.*--http-port"):
                lay_out([SMALL], workers=1, gateways=1, http_port=port, grpc_port=free_port())
            with pytest.raises(PortTakenError, match=rf"port {port}.*--grpc-port"):
                lay_out([SMALL], workers=1, gateways=1, http_port=free_port(), grpc_port=port)
            assert port not in ports.pick(3, preferred=(port,))

    def test_port_of_a_closed_connection_is_free(self) -> None:
        with socket.create_server((ports.HOST, 0)) as server:
            port = server.getsockname()[1]
            with socket.create_connection((ports.HOST, port)):
                accepted, _ = server.accept()
                accepted.close()  # the server's side closes first and stays in TIME_WAIT
        assert ports.is_free(port)

    def test_same_public_port_twice(self) -> None:
        with pytest.raises(PlanError, match="both 4321"):
            lay_out([SMALL], workers=1, gateways=1, http_port=4321, grpc_port=4321)

    def test_no_port_comes_twice(self) -> None:
        made = plan(SMALL, BIG, workers=3, trainers=2)
        used = [made.http_port, made.grpc_port, made.scheduler_port, made.scheduler_metrics_port]
        places = (*made.workers, *made.trainers)
        used += [port for place in places for port in (place.port, place.metrics_port)]
        assert len(set(used)) == len(used) == 4 + 2 * 6 + 2 * 2


class TestPlan:
    def test_survives_json(self) -> None:
        made = plan(SMALL, BIG, workers=2, gateways=3, trainers=1)
        assert MeshPlan.from_json(json.loads(json.dumps(made.to_json()))) == made

    def test_shape_is_what_was_asked_for(self) -> None:
        made = plan(SMALL, BIG, workers=2, gateways=3, trainers=2)
        request = UpRequest(
            models=["small=./small", "big=hub:o/big"],
            workers=2,
            trainers=2,
            gateways=3,
            http_port=made.http_port,
            grpc_port=made.grpc_port,
            timeout_s=1,
        )
        assert made.shape() == request.shape()

    def test_services(self) -> None:
        made = plan(SMALL, BIG, workers=2, trainers=1)
        specs = built(made, {"LMESH_SCHEDULER_REDIS_URL": "redis://mine"})
        workers = [f"worker-{i}" for i in range(4)]
        assert list(specs) == ["scheduler", *workers, "trainer-0", "gateway"]
        assert specs["scheduler"].env["LMESH_SCHEDULER_REDIS_URL"] == "redis://mine"
        assert [specs[f"worker-{i}"].env["LMESH_WORKER_MODEL_ID"] for i in range(4)] == ["small"] * 2 + ["big"] * 2
        assert specs["worker-3"].env["LMESH_WORKER_MODEL"] == "hub:o/big@1"
        order = sorted(specs.values(), key=lambda s: s.stop_stage)
        assert order[0].name == "gateway" and order[-1].name == "scheduler"

    def test_random_weights_are_the_workers_matter(self) -> None:
        http, grpc = ports.pick(2)
        made = lay_out([SMALL], workers=1, gateways=1, http_port=http, grpc_port=grpc, load_format="dummy")
        assert MeshPlan.from_json(json.loads(json.dumps(made.to_json()))).load_format == "dummy"
        assert made.shape()["load_format"] == "dummy" != plan(SMALL).shape()["load_format"]
        user = {"LMESH_SCHEDULER_REDIS_URL": "redis://mine"}
        assert built(made, user)["worker-0"].env["LMESH_WORKER_LOAD_FORMAT"] == "dummy"
        assert "LMESH_WORKER_LOAD_FORMAT" not in built(plan(SMALL), user)["worker-0"].env  # what is exported holds
        with pytest.raises(PlanError, match="auto or dummy"):
            lay_out([SMALL], workers=1, gateways=1, http_port=http, grpc_port=grpc, load_format="fast")

    def test_trainer(self) -> None:
        made = plan(SMALL, trainers=2)
        specs = built(made, {"LMESH_SCHEDULER_REDIS_URL": "redis://mine"})
        second = specs["trainer-1"]
        assert second.argv[1:] == ("-P", "-m", "lmesh_trainer")
        assert second.env["LMESH_TRAINER_ADDRESS"] == f"{ports.HOST}:{made.trainers[1].port}"
        assert second.env["LMESH_TRAINER_METRICS_PORT"] == str(made.trainers[1].metrics_port)
        assert (second.env["LMESH_TRAINER_ID"], second.env["LMESH_TRAINER_SCHEDULER"]) == (
            "trainer-1",
            made.scheduler_address,
        )
        assert second.env["LMESH_TRAINER_HUB"] == "true"
        assert "trainer-0" not in built(plan(SMALL), {"LMESH_SCHEDULER_REDIS_URL": "redis://mine"})

    def test_artifacts_are_shared_and_may_be_elsewhere(self) -> None:
        names = {"gateway": "LMESH_GATEWAY_ARTIFACTS", "worker-0": "LMESH_WORKER_ARTIFACTS"}
        names["trainer-0"] = "LMESH_TRAINER_ARTIFACTS"
        env = {"LMESH_SCHEDULER_REDIS_URL": "redis://mine"}
        specs = built(plan(SMALL, trainers=1), env)
        assert {specs[service].env[name] for service, name in names.items()} == {str(ARTIFACTS)}
        moved = built(plan(SMALL, trainers=1), env | dict.fromkeys(names.values(), "/big"))
        assert {moved[service].env[name] for service, name in names.items()} == {"/big"}


class TestSharing:
    def test_a_lone_worker_gets_the_machine(self) -> None:
        assert share_of_machine(1, {}, gpus=["0"], cores=8) == [{}]

    def test_cpu_is_divided(self) -> None:
        shares = share_of_machine(2, {}, gpus=[], cores=8)
        assert [share["LMESH_WORKER_THREADS"] for share in shares] == ["4", "4"]
        assert sum(float(share["LMESH_WORKER_MEMORY_FRACTION"]) for share in shares) <= 0.8

    def test_every_worker_gets_a_thread_and_no_core_twice(self) -> None:
        assert [s["LMESH_WORKER_THREADS"] for s in share_of_machine(3, {}, gpus=[], cores=2)] == ["1"] * 3
        assert [s["LMESH_WORKER_THREADS"] for s in share_of_machine(3, {}, gpus=[], cores=8)] == ["2"] * 3

    def test_cores_are_those_that_may_be_used(self, monkeypatch) -> None:
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)), raising=False)
        monkeypatch.setattr(os, "cpu_count", lambda: 64)
        assert [s["LMESH_WORKER_THREADS"] for s in share_of_machine(2, {}, gpus=[])] == ["3", "3"]

    def test_gpus_go_round(self) -> None:
        shares = share_of_machine(3, {}, gpus=["2", "5"], cores=8)
        assert [share["CUDA_VISIBLE_DEVICES"] for share in shares] == ["2", "5", "2"]
        assert "LMESH_WORKER_MEMORY_FRACTION" not in shares[1]
        assert shares[0]["LMESH_WORKER_MEMORY_FRACTION"] == shares[2]["LMESH_WORKER_MEMORY_FRACTION"] == "0.450"

    def test_trainers_take_the_gpus_that_no_worker_has(self) -> None:
        assert gpus_for_trainers(2, 1, {}, gpus=["2", "5", "7"]) == [
            {"CUDA_VISIBLE_DEVICES": "5"},
            {"CUDA_VISIBLE_DEVICES": "7"},
        ]
        assert gpus_for_trainers(1, 1, {}, gpus=["2"]) == [{"CUDA_VISIBLE_DEVICES": "2"}]
        assert gpus_for_trainers(1, 1, {}, gpus=[]) == [{}]

    def test_what_the_user_set_stays(self) -> None:
        shares = share_of_machine(2, {"LMESH_WORKER_THREADS": "1"}, gpus=[], cores=8)
        assert all("LMESH_WORKER_THREADS" not in share for share in shares)

    def test_visible_gpus(self, tmp_path) -> None:
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
        assert visible_gpus({}, tmp_path) == ["0", "1"]
        assert visible_gpus({"CUDA_VISIBLE_DEVICES": "3, 7"}, tmp_path) == ["3", "7"]
        assert visible_gpus({"CUDA_VISIBLE_DEVICES": "-1"}, tmp_path) == []
        assert visible_gpus({"LMESH_WORKER_DEVICE": "cpu"}, tmp_path) == []
        assert visible_gpus({}, tmp_path / "absent") == []


class TestLogFiles:
    def test_a_long_log_is_moved_under_its_writer(self, tmp_path) -> None:
        path = tmp_path / "service.log"
        with log_files.open_append(path) as writer:
            writer.write(b"old " * 100)
            writer.flush()
            assert not log_files.bound(path, 400)
            assert log_files.bound(path, 399)
            writer.write(b"new\n")
            writer.flush()
            assert path.read_bytes() == b"new\n"
        assert (tmp_path / "service.log.1").read_bytes() == b"old " * 100

    def test_tail(self, tmp_path) -> None:
        path = tmp_path / "service.log"
        assert log_files.tail(path) == ""
        path.write_text("".join(f"line {i}\n" for i in range(50)))
        assert log_files.tail(path, 2) == "line 48\nline 49"
