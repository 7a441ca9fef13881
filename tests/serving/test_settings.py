"""How the service is set up: names, token, scaling; and batches that may not change an answer."""

import socket
import threading
import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import ray
import torch
from hypothesis import given
from hypothesis import strategies as st
from ray import serve
from ray.serve.schema import ServeStatus
from small_models import save_tokenizer

from bsq_ray.config.loader import check_section
from bsq_ray.serving.app import build, options
from bsq_ray.serving.batch_invariance import ExactBatches, pieces
from bsq_ray.serving.server import is_loopback, running, settings_of
from bsq_ray.serving.service_config import Settings


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("one") / "tiny", seed=0)


def test_a_model_is_called_as_its_configuration_or_as_one_says(model):
    assert settings_of([model, f"other={model}"], "127.0.0.1", None, []).models == {"tiny": model, "other": model}
    with pytest.raises(ValueError, match="two models are called tiny; give one another name"):
        settings_of([model, model], "127.0.0.1", None, [])
    with pytest.raises(ValueError, match="is not a model folder"):
        settings_of([model + "/none"], "127.0.0.1", None, [])


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("127.8.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False),
     ("10.0.0.1", False), ("example.org", False)],
)  # fmt: skip
def test_whoever_listens_to_others_asks_for_a_token(model, host, loopback):
    assert is_loopback(host) is loopback
    assert settings_of([model], host, None, []).authentication is not loopback
    for wanted in (True, False):
        assert settings_of([model], host, wanted, []).authentication is wanted


def test_on_a_cluster_the_token_must_be_there(model, monkeypatch):
    monkeypatch.delenv("BSQ_RAY_TOKEN", raising=False)
    with pytest.raises(ValueError, match="BSQ_RAY_TOKEN must hold a token"):
        build({"models": {"tiny": model}})
    monkeypatch.setenv("BSQ_RAY_TOKEN", "short")
    with pytest.raises(ValueError, match="16 characters"):
        build({"models": {"tiny": model}})


@pytest.mark.parametrize("token", ["x", "15-characters-x"])
def test_a_short_token_is_refused_on_this_machine_too(model, monkeypatch, token):
    monkeypatch.setenv("BSQ_RAY_TOKEN", token)
    settings = Settings(models={"tiny": model})
    monkeypatch.setattr("bsq_ray.serving.server.ray_session", lambda _: pytest.fail("Ray is started"))
    with pytest.raises(ValueError, match="must hold a token of 16 characters"), running(settings, "0.0.0.0", 0):
        pass


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["tokenizer.gpu=1"], "did you mean tokenizer.gpus?"),
        (["front.gpus=1"], "front.gpus"),
        (["limits.waiting=0"], "limits.waiting"),
        (["codec.replicas=3", "codec.most_replicas=2"], "most_replicas 2 is below replicas 3"),
        (["models={}"], "name at least one model folder"),
        (['models={"größer": "b"}'], "'größer' is no name"),
        (['models={"": "b"}'], "'' is no name"),
    ],
)
def test_wrong_settings_are_refused_with_the_key(overrides, said):
    with pytest.raises(ValueError, match=said.replace(".", r"\.").replace("?", r"\?")):
        check_section({"models": {"a": "b"}}, overrides, Settings, "the service")


def test_what_a_cluster_serves_already_is_left_alone(model, monkeypatch):
    stopped = []
    monkeypatch.setattr("bsq_ray.serving.server.ray_session", nullcontext)
    monkeypatch.setattr(serve, "status", lambda: ServeStatus(proxies={"a-machine": "HEALTHY"}))
    monkeypatch.setattr(serve, "shutdown", lambda: stopped.append(True))
    settings = Settings(models={"tiny": model}, authentication=False)
    with pytest.raises(ValueError, match="Ray Serve already runs on this cluster"), running(settings, "127.0.0.1", 0):
        pass
    assert not stopped


@pytest.mark.parametrize(
    ("host", "url", "note"),
    [
        ("127.0.0.1", "http://127.0.0.1:8000/", "ssh -N -L 8000:127.0.0.1:8000 10.0.0.1"),
        ("::1", "http://[::1]:8000/", "ssh -N -L 8000:[::1]:8000 10.0.0.1"),
        ("0.0.0.0", "http://10.0.0.1:8000/", "the cluster's head 10.0.0.1 listens"),
        ("::", "http://10.0.0.1:8000/", "the cluster's head 10.0.0.1 listens"),
    ],
)
def test_on_another_machines_cluster_its_head_listens(model, monkeypatch, host, url, note):
    head = {
        "Alive": True,
        "NodeID": "far",
        "NodeManagerAddress": "10.0.0.1",
        "Resources": {"node:__internal_head__": 1},
    }
    here = {"Alive": True, "NodeID": "here", "NodeManagerAddress": "10.0.0.2", "Resources": {"CPU": 4}}
    asked = []
    monkeypatch.setattr("bsq_ray.serving.server.ray_session", nullcontext)
    monkeypatch.setattr(ray, "nodes", lambda: [here, head])
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "here"))
    monkeypatch.setattr(serve, "status", lambda: ServeStatus(proxies={}))
    for name in ("run", "shutdown"):
        monkeypatch.setattr(serve, name, lambda *_, **__: None)
    monkeypatch.setattr(serve, "start", lambda http_options, **_: asked.append(http_options))
    settings = Settings(models={"tiny": model}, authentication=False)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        # Taken here, which says nothing about the head.
        with running(settings, host, port, "10.0.0.1:6379") as service:
            assert service.url == url.replace("8000", str(port))
            assert note.replace("8000", str(port)) in service.note
    assert asked == [{"host": host, "port": port}]
    with pytest.raises(ValueError, match="choose one"), running(settings, host, 0, "10.0.0.1:6379"):
        pass


def test_a_port_that_is_taken_is_named(ray_local, model):
    settings = Settings(models={"tiny": model}, authentication=False)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with (
            pytest.raises(ValueError, match=f"cannot listen on 127.0.0.1:{port}: .*; choose another --port"),
            running(settings, "127.0.0.1", port),
        ):
            pass


def test_each_kind_of_deployment_scales_on_its_own():
    overrides = [
        "tokenizer.replicas=2", "tokenizer.gpus=0.25", "codec.most_replicas=5", "codec.queue=3", "generator.cpus=4",
        "limits.waiting=7", "front.replicas=3", "front.cpus=2",
    ]  # fmt: skip
    settings = check_section({"models": {"a": "b"}}, overrides, Settings, "the service")
    sections = settings.tokenizer, settings.codec, settings.generator, settings.front
    tokenizer, codec, generator, front = (options(section, 8, settings) for section in sections)
    nothing_told = {"runtime_env": {}}
    assert (front["num_replicas"], front["ray_actor_options"]) == (3, {"num_cpus": 2, "num_gpus": 0} | nothing_told)
    assert (tokenizer["num_replicas"], tokenizer["ray_actor_options"]["num_gpus"]) == (2, 0.25)
    assert settings.tokenizer.device == "cuda"
    scaling = codec["autoscaling_config"]
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (1, 5, 3)
    assert generator["ray_actor_options"]["num_cpus"] == 4
    assert "GLIBC_TUNABLES" in generator["ray_actor_options"]["runtime_env"]["env_vars"]
    assert tokenizer["ray_actor_options"]["runtime_env"] == {}
    assert {part["max_queued_requests"] for part in (tokenizer, codec, generator)} == {7}


def test_only_sizes_that_change_no_bit_are_used():
    """A computation that adds up differently in batches of 4, as a matrix product may."""
    seen = []

    def run(rows):
        seen.append(len(rows))
        return rows * 3 + (1e-7 if len(rows) == 4 else 0)

    rows = torch.rand(8, 5)
    exact = ExactBatches(run, rows)
    assert (exact.sizes, exact.core_sizes) == ([8, 2, 1], [])
    seen.clear()
    assert torch.equal(exact(torch.cat([rows, rows[:7]])), torch.cat([rows, rows[:7]]) * 3)
    assert seen == [8, 2, 2, 2, 1]


def test_cores_share_a_batch_and_compute_the_rest_together():
    seen = []

    def run(rows, more):
        seen.append((threading.current_thread().name[:4], torch.get_num_threads(), len(rows)))
        return rows + more

    rows = torch.rand(8, 5)
    exact = ExactBatches(run, rows, rows, cores=2)
    assert (exact.sizes, exact.core_sizes) == ([8, 4, 2, 1], [4, 2, 1])
    seen.clear()
    assert torch.equal(exact(rows[:7], rows[:7]), 2 * rows[:7])
    together = (threading.current_thread().name[:4], torch.get_num_threads(), 1)
    assert sorted(seen[:4]) == [("core", 1, 1)] * 2 + [("core", 1, 2)] * 2
    assert seen[4:] == [together]


def test_cores_do_not_share_a_batch_if_that_changes_a_bit():
    def run(rows):
        return rows * 3 + (1e-7 if threading.current_thread().name.startswith("core") else 0)

    exact = ExactBatches(run, torch.rand(8, 5), cores=2)
    assert (exact.sizes, exact.core_sizes) == ([8, 4, 2, 1], [])
    assert torch.equal(exact(torch.ones(3, 5)), torch.full((3, 5), 3.0))


def test_a_model_that_takes_long_is_not_tried_in_large_batches():
    def run(rows):
        time.sleep(0.02 * len(rows))
        return rows

    assert ExactBatches(run, torch.rand(64, 2), seconds=0.2).sizes in ([2, 1], [4, 2, 1])


@given(st.integers(0, 200), st.sets(st.sampled_from([2, 4, 8, 16, 32])))
def test_pieces_cover_a_batch_once(count, sizes):
    allowed = sorted(sizes | {1}, reverse=True)
    found = list(pieces(count, allowed))
    assert [row for piece in found for row in range(piece.start, piece.stop)] == list(range(count))
    assert {piece.stop - piece.start for piece in found} <= set(allowed)
