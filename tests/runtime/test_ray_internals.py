"""Contracts with the private parts of Ray; run against a new release of Ray with `pytest -m internals`."""

import asyncio

import pytest
import ray
from ray.util.placement_group import placement_group, remove_placement_group

from bsq_ray.runtime import _ray_internals as internals

pytestmark = pytest.mark.internals


def test_draining_nodes_healthy_cluster_is_empty(ray_local):
    """A cluster without a preemption notice has no draining node; the elastic test drains one."""
    assert internals.draining_nodes() == set()


def test_autoscaler_limits_without_autoscaler_is_none(ray_local):
    """A local Ray publishes no limits."""
    assert internals.autoscaler_limits() is None


def test_autoscaler_limits_sums_node_groups(ray_local, monkeypatch):
    """The limits are read from the cluster configuration that an autoscaler publishes."""
    from ray._private.state import state
    from ray.core.generated.autoscaler_pb2 import ClusterConfig, NodeGroupConfig

    group = NodeGroupConfig(resources={"CPU": 32, "GPU": 4}, max_count=3, name="gpus")
    monkeypatch.setattr(state, "get_cluster_config", lambda: ClusterConfig(node_group_configs=[group]))
    limits = internals.autoscaler_limits()
    assert (limits["CPU"], limits["GPU"]) == (96, 12)


def test_is_startup_timeout_recognizes_only_timeouts():
    """Ray Train's startup timeout is distinguished from other errors of its controller."""
    from ray.train import ControllerError
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

    assert internals.is_startup_timeout(ControllerError(WorkerGroupStartupTimeoutError(2)))
    assert "worker group startup timed out" in str(ControllerError(WorkerGroupStartupTimeoutError(2)))
    assert not internals.is_startup_timeout(ControllerError(OSError("the driver is missing")))
    assert not internals.is_startup_timeout(OSError("worker group startup timed out"))


def test_placement_groups_of_living_creators_are_kept(ray_local):
    """A group whose creator is alive is not listed; tests/tuning/test_placement_group_cleanup.py kills a creator."""
    group = placement_group([{"CPU": 0.1}])
    assert group.wait(60)
    assert internals.placement_groups_of_dead_actors() == []
    remove_placement_group(group)


def test_stub_trial_is_accepted_by_schedulers():
    """A scheduler accepts reports of a trial that never runs."""
    from ray.tune.schedulers import AsyncHyperBandScheduler

    scheduler = AsyncHyperBandScheduler(time_attr="step", metric="psnr", mode="max", max_t=10, grace_period=1)
    trial = internals.stub_trial("earlier-0", {"number": 0})
    scheduler.on_trial_add(None, trial)
    assert scheduler.on_trial_result(None, trial, {"step": 1, "psnr": 20.0}) == "CONTINUE"
    assert trial.config["number"] == 0


def test_trial_error_text_of_failed_trial(ray_local, tmp_path):
    """The text of a failed trial ends with the error's type and message."""
    from ray import tune

    texts = []

    class Callback(tune.Callback):
        def on_trial_error(self, iteration, trials, trial, **info):
            texts.append(internals.trial_error_text(trial))

    def fail(config):
        raise RuntimeError("the disk was full")

    tune.run(fail, raise_on_failed_trial=False, verbose=0, callbacks=[Callback()], storage_path=str(tmp_path))
    [text] = texts
    assert text.startswith("Failure # 1")
    assert text.rstrip().endswith("RuntimeError: the disk was full")


def test_block_to_numpy_returns_columns(ray_local):
    """The columns of a materialized block are NumPy arrays."""
    [bundle] = ray.data.range(3, override_num_blocks=1).materialize().iter_internal_ref_bundles()
    [reference] = bundle.block_refs
    assert internals.block_to_numpy(ray.get(reference))["id"].tolist() == [0, 1, 2]


def test_serve_names_match_ray():
    """The proxy's callback variable, the disconnect header and the head's resource are those of this Ray."""
    from ray._common.constants import HEAD_NODE_RESOURCE_NAME
    from ray.serve._private import constants

    assert hasattr(constants, internals.serve_http_callback_env())
    assert internals.disconnect_disabled_header().decode() == constants.SERVE_HTTP_REQUEST_DISCONNECT_DISABLED_HEADER
    assert internals.head_node_resource() == HEAD_NODE_RESOURCE_NAME


def test_serve_proxy_calls_the_callback(monkeypatch):
    """The proxy adds the middlewares that the callback of the variable returns."""
    from ray.serve._private import http_util
    from ray.serve.config import HTTPOptions
    from starlette.middleware import Middleware

    middleware = Middleware(lambda app: app)
    monkeypatch.setattr(http_util, internals.serve_http_callback_env(), "some.module.function")
    monkeypatch.setattr(http_util, "call_function_from_import_path", lambda path: [middleware])
    assert http_util.configure_http_middlewares(HTTPOptions()).middlewares == [middleware]


def test_head_node_resource_is_on_the_head_only(ray_local):
    """The node of a local Ray is its head."""
    [node] = ray.nodes()
    assert internals.head_node_resource() in node["Resources"]


def test_replace_receive_source_changes_only_ray_objects():
    """Ray's receive object fetches messages from the new source; other objects are unchanged."""
    import pickle

    from ray.serve._private.http_util import ASGIReceiveProxy

    async def messages(metadata):
        return pickle.dumps([{"type": "http.request", "body": b"attached"}, {"type": "http.disconnect"}])

    async def receive_one():
        receive = ASGIReceiveProxy({"type": "http"}, None, None)
        assert internals.replace_receive_source(receive, messages)
        task = asyncio.ensure_future(receive.fetch_until_disconnect())
        message = await receive()
        await task
        return message

    assert asyncio.run(receive_one())["body"] == b"attached"
    assert not internals.replace_receive_source(lambda: None, messages)
