"""The settings of the service (names, token, scaling), its start, and batch invariance."""

import shutil
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

from bsq_ray.config.loader import validate_mapping
from bsq_ray.serving.app import build, deployment_options
from bsq_ray.serving.batch_invariance import BatchInvariantRunner, chunk_slices
from bsq_ray.serving.server import is_loopback, parse_settings, serve_app
from bsq_ray.serving.service_config import Settings


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("one") / "tiny", seed=0)


def test_parse_settings_names_models(model):
    """A model takes its name from its configuration or from NAME=FOLDER."""
    assert parse_settings([model, f"other={model}"], "127.0.0.1").models == {"tiny": model, "other": model}
    with pytest.raises(ValueError, match="two models are named tiny; rename one of them"):
        parse_settings([model, model], "127.0.0.1")
    with pytest.raises(ValueError, match="model folder .*/none does not exist"):
        parse_settings([model + "/none"], "127.0.0.1")


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("127.8.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False),
     ("10.0.0.1", False), ("example.org", False), ("LOCALHOST", True), ("localhost.", True), ("127.1", True),
     ("0x7f.1", True), ("2130706433", True), ("::ffff:127.0.0.1", True), ("10.1", False), ("::ffff:10.0.0.1", False),
     ("999", False), ("999.1.1.1.", False), ("127.0.0.1.example.org", False), ("", False), (".", False)],
)  # fmt: skip
def test_parse_settings_public_host_requires_token(model, host, loopback):
    """A host that others can reach requires a token unless the option overrides it."""
    assert is_loopback(host) is loopback
    assert parse_settings([model], host).authentication is not loopback
    for require_token in (True, False):
        assert parse_settings([model], host, require_token=require_token).authentication is require_token


def test_build_without_token_raises(model, monkeypatch):
    """On a cluster the token must be set and long enough."""
    monkeypatch.delenv("BSQ_RAY_TOKEN", raising=False)
    with pytest.raises(ValueError, match="BSQ_RAY_TOKEN must be a token"):
        build({"models": {"tiny": model}})
    monkeypatch.setenv("BSQ_RAY_TOKEN", "short")
    with pytest.raises(ValueError, match="16 characters"):
        build({"models": {"tiny": model}})


@pytest.mark.parametrize("token", ["x", "15-characters-x"])
def test_serve_app_short_token_raises(model, monkeypatch, token):
    """A short token raises ValueError before Ray starts."""
    monkeypatch.setenv("BSQ_RAY_TOKEN", token)
    settings = Settings(models={"tiny": model})
    monkeypatch.setattr("bsq_ray.serving.server.ray_session", lambda _: pytest.fail("Ray was started"))
    with (
        pytest.raises(ValueError, match="must be a token of at least 16 characters"),
        serve_app(settings, "0.0.0.0", 0),
    ):
        pass


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["tokenizer.num_gpu=1"], "did you mean tokenizer.num_gpus?"),
        (["ingress.num_gpus=1"], "ingress.num_gpus"),
        (["limits.max_ongoing_requests=0"], "limits.max_ongoing_requests"),
        (["codec.min_replicas=3", "codec.max_replicas=2"], "max_replicas 2 is below min_replicas 3"),
        (["models={}"], "name at least one model folder"),
        (['models={"größer": "b"}'], "invalid model name 'größer'"),
        (['models={"": "b"}'], "invalid model name ''"),
    ],
)
def test_invalid_settings_error_names_the_key(overrides, message):
    """An invalid setting raises an error that names its key."""
    with pytest.raises(ValueError, match=message.replace(".", r"\.").replace("?", r"\?")):
        validate_mapping({"models": {"a": "b"}}, overrides, Settings, "the service")


@pytest.mark.parametrize(
    ("folder", "argument", "expected"),
    [
        ("runs/lr=1e-4/model", "runs/lr=1e-4/model", None),
        ("lr=1e-4", "lr=1e-4", None),
        ("./a=b=c", "./a=b=c", None),
        ("plain", "plain", None),
        ("runs/lr=1e-4/model", "best=runs/lr=1e-4/model", "best"),
        ("x=y", "v1.2_a-b=x=y", "v1.2_a-b"),
        ("plain", "m=plain", "m"),
    ],
)
def test_model_argument_is_a_path_or_a_named_path(model, tmp_path, monkeypatch, folder, argument, expected):
    """An existing path is a path, whatever it contains; a valid name before "=" is a name."""
    shutil.copytree(model, tmp_path / folder)
    monkeypatch.chdir(tmp_path)
    settings = parse_settings([argument], "127.0.0.1")
    [(name, url)] = settings.models.items()
    assert name == (expected or "tiny")
    assert url == str((tmp_path / folder).resolve())


@pytest.mark.parametrize("argument", ["lr=1e-4/mine", "runs/lr=1e-4/x/mine", "./lr=1e-4/a=b"])
def test_mistyped_model_path_is_reported_as_a_whole(tmp_path, monkeypatch, argument):
    (tmp_path / argument).parent.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=rf"model folder \S*{argument} does not exist"):
        parse_settings([argument], "127.0.0.1")


def test_invalid_model_name_before_folder_raises(model):
    with pytest.raises(ValueError, match="invalid model name 'größer'"):
        parse_settings([f"größer={model}"], "127.0.0.1")


def test_serve_app_keeps_running_applications(model, monkeypatch):
    """A cluster that already serves applications is left unchanged."""
    shutdown_calls = []
    monkeypatch.setattr("bsq_ray.serving.server.ray_session", nullcontext)
    monkeypatch.setattr(serve, "status", lambda: ServeStatus(proxies={"a-node": "HEALTHY"}))
    monkeypatch.setattr(serve, "shutdown", lambda: shutdown_calls.append(True))
    settings = Settings(models={"tiny": model}, authentication=False)
    with pytest.raises(ValueError, match="Ray Serve already runs on this cluster"), serve_app(settings, "127.0.0.1", 0):
        pass
    assert not shutdown_calls


@pytest.mark.parametrize(
    ("host", "url", "note"),
    [
        ("127.0.0.1", "http://127.0.0.1:8000/", "ssh -N -L 8000:127.0.0.1:8000 10.0.0.1"),
        ("::1", "http://[::1]:8000/", "ssh -N -L 8000:[::1]:8000 10.0.0.1"),
        ("0.0.0.0", "http://10.0.0.1:8000/", "the head node 10.0.0.1 listens"),
        ("::", "http://10.0.0.1:8000/", "the head node 10.0.0.1 listens"),
    ],
)
def test_serve_app_remote_cluster_listens_on_head(model, monkeypatch, host, url, note):
    """On a remote cluster the head node listens, and the note explains how to reach it."""
    head = {
        "Alive": True,
        "NodeID": "far",
        "NodeManagerAddress": "10.0.0.1",
        "Resources": {"node:__internal_head__": 1},
    }
    local_node = {"Alive": True, "NodeID": "here", "NodeManagerAddress": "10.0.0.2", "Resources": {"CPU": 4}}
    http_options_seen = []
    monkeypatch.setattr("bsq_ray.serving.server.ray_session", nullcontext)
    monkeypatch.setattr(ray, "nodes", lambda: [local_node, head])
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "here"))
    monkeypatch.setattr(serve, "status", lambda: ServeStatus(proxies={}))
    for name in ("run_many", "shutdown"):
        monkeypatch.setattr(serve, name, lambda *_, **__: None)
    monkeypatch.setattr("bsq_ray.serving.server._wait_until_running", lambda _: None)
    monkeypatch.setattr("bsq_ray.serving.server.max_cluster_resources", lambda: {"CPU": 4.0})
    monkeypatch.setattr(serve, "start", lambda http_options, **_: http_options_seen.append(http_options))
    settings = Settings(models={"tiny": model}, authentication=False)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        # The port is in use on this node, but free on the head node.
        with serve_app(settings, host, port, address="10.0.0.1:6379") as server:
            assert server.url == url.replace("8000", str(port))
            assert note.replace("8000", str(port)) in server.note
    assert http_options_seen == [{"host": host, "port": port}]
    with pytest.raises(ValueError, match="choose a port"), serve_app(settings, host, 0, address="10.0.0.1:6379"):
        pass


def test_serve_app_port_in_use_error_names_port(ray_local, model):
    """The error for a port in use names the port."""
    settings = Settings(models={"tiny": model}, authentication=False)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with (
            pytest.raises(ValueError, match=f"cannot listen on 127.0.0.1:{port}: .*; choose another --port"),
            serve_app(settings, "127.0.0.1", port),
        ):
            pass


def test_deployment_options_scale_independently():
    """Each deployment has its own scaling options."""
    overrides = [
        "tokenizer.min_replicas=2", "tokenizer.num_gpus=0.25", "codec.max_replicas=5",
        "codec.target_ongoing_requests=3", "generator.num_cpus=4",
        "limits.max_ongoing_requests=7", "ingress.min_replicas=3", "ingress.num_cpus=2",
    ]  # fmt: skip
    settings = validate_mapping({"models": {"a": "b"}}, overrides, Settings, "the service")
    deployment_configs = settings.tokenizer, settings.codec, settings.generator, settings.ingress
    tokenizer, codec, generator, ingress = (deployment_options(scaling, 8, settings) for scaling in deployment_configs)
    empty_runtime_env = {"runtime_env": {}}
    assert (ingress["num_replicas"], ingress["ray_actor_options"]) == (
        3,
        {"num_cpus": 2, "num_gpus": 0} | empty_runtime_env,
    )
    assert (tokenizer["num_replicas"], tokenizer["ray_actor_options"]["num_gpus"]) == (2, 0.25)
    assert settings.tokenizer.device == "cuda"
    scaling = codec["autoscaling_config"]
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (1, 5, 3)
    assert generator["ray_actor_options"]["num_cpus"] == 4
    assert "GLIBC_TUNABLES" in generator["ray_actor_options"]["runtime_env"]["env_vars"]
    assert tokenizer["ray_actor_options"]["runtime_env"] == {}
    assert {part["max_queued_requests"] for part in (tokenizer, codec, generator)} == {7}


def test_batch_invariant_runner_uses_only_safe_sizes():
    """A batch size that changes the result, as a matrix product may, is not used."""
    batch_sizes = []

    def run(rows):
        batch_sizes.append(len(rows))
        return rows * 3 + (1e-7 if len(rows) == 4 else 0)

    rows = torch.rand(8, 5)
    runner = BatchInvariantRunner(run, rows)
    assert (runner.sizes, runner.per_core_sizes) == ([8, 2, 1], [])
    batch_sizes.clear()
    assert torch.equal(runner(torch.cat([rows, rows[:7]])), torch.cat([rows, rows[:7]]) * 3)
    assert batch_sizes == [8, 2, 2, 2, 1]


def test_batch_invariant_runner_splits_batch_over_cores():
    """Cores split a batch, and all cores compute the remainder together."""
    calls = []

    def run(rows, more):
        calls.append((threading.current_thread().name[:4], torch.get_num_threads(), len(rows)))
        return rows + more

    rows = torch.rand(8, 5)
    runner = BatchInvariantRunner(run, rows, rows, num_cores=2)
    assert (runner.sizes, runner.per_core_sizes) == ([8, 4, 2, 1], [4, 2, 1])
    calls.clear()
    assert torch.equal(runner(rows[:7], rows[:7]), 2 * rows[:7])
    together = (threading.current_thread().name[:4], torch.get_num_threads(), 1)
    assert sorted(calls[:4]) == [("core", 1, 1)] * 2 + [("core", 1, 2)] * 2
    assert calls[4:] == [together]


def test_batch_invariant_runner_skips_unsafe_core_split():
    """Cores do not split a batch if that changes the result."""

    def run(rows):
        return rows * 3 + (1e-7 if threading.current_thread().name.startswith("core") else 0)

    runner = BatchInvariantRunner(run, torch.rand(8, 5), num_cores=2)
    assert (runner.sizes, runner.per_core_sizes) == ([8, 4, 2, 1], [])
    assert torch.equal(runner(torch.ones(3, 5)), torch.full((3, 5), 3.0))


def test_batch_invariant_runner_slow_model_limits_sizes():
    """Calibration of a slow model stops at small batch sizes."""

    def run(rows):
        time.sleep(0.02 * len(rows))
        return rows

    assert max(BatchInvariantRunner(run, torch.rand(64, 2), timeout_s=0.2).sizes) <= 4


@given(st.integers(0, 200), st.sets(st.sampled_from([2, 4, 8, 16, 32])))
def test_chunk_slices_cover_batch_exactly_once(num_rows, sizes):
    """The slices cover every row of a batch exactly once."""
    allowed = sorted(sizes | {1}, reverse=True)
    slices = list(chunk_slices(num_rows, allowed))
    assert [row for piece in slices for row in range(piece.start, piece.stop)] == list(range(num_rows))
    assert {piece.stop - piece.start for piece in slices} <= set(allowed)
