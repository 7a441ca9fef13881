"""Autoscaling: a run on an empty cluster starts nodes, which end after the run.

Ray's autoscaler decides; its provider for tests starts processes instead of cloud instances.
"""

import json
import shutil

import pytest
import yaml
from small_job import TINY_OVERRIDES
from virtual_nodes import virtual_nodes, wait_until

pytestmark = pytest.mark.slow
HEAD_ID = "f" * 51 + "00000"
EMPTY_LISTS = ["initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands"]
EMPTY_LISTS += ["head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files", "rsync_exclude"]
CONFIG = {
    "cluster_name": "bsq",
    "provider": {
        "type": "external",
        "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
        "use_node_id_as_ip": True,
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
        "launch_multiple": True,
        "head_node_id": HEAD_ID,
    },
    "max_workers": 2,
    "idle_timeout_minutes": 0.1,
    "upscaling_speed": 1.0,
    "head_node_type": "ray.head.default",
    "available_node_types": {
        "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "cpu2": {
            "resources": {"CPU": 2, "object_store_memory": 150_000_000},
            "node_config": {},
            "min_workers": 0,
            "max_workers": 2,
        },
    },
    **{name: {} for name in ("auth", "docker", "file_mounts")},
    "file_mounts_sync_continuously": False,
    **{name: [] for name in (*EMPTY_LISTS, "rsync_filter")},
}
AUTOSCALER = {
    "RAY_FAKE_CLUSTER": "1",
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    "RAY_enable_autoscaler_v2": "1",
    "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
}


def test_autoscaling_submitted_run_scales_up_and_down(photo_shards):
    """A submitted run starts nodes on an empty cluster, and they end when the run is done."""
    with virtual_nodes(1) as ([head], shared):
        shutil.copytree(photo_shards, shared / "shards")
        (shared / "autoscaling.yaml").write_text(yaml.safe_dump(CONFIG))
        start_options = [
            "--autoscaling-config=/tmp/shared/autoscaling.yaml",
            "--dashboard-host=127.0.0.1",
            "--num-cpus=0",
        ]
        start = ["ray", "start", "--head", "--block", "--port=6379", "--object-store-memory=200000000", *start_options]
        head.start(*start, log=shared / "head.log", **AUTOSCALER)
        counts_file = head.start_counting_nodes()
        wait_until(lambda: counts_file.read_text() == "1\n", shared / "head.log")

        job = ["python", "/opt/bsq_ray/jobs/train_tokenizer.py", "--config", "demo-gan", "--data", "/tmp/shared/shards"]
        job += ["--out", "/tmp/shared/run", "--workers", "2", *TINY_OVERRIDES, "training.steps=20"]
        # Without a working directory, because all nodes share one folder and the first node that ends removes it.
        submit = ["ray", "job", "submit", "--address", "http://127.0.0.1:8265", "--"]
        completed = head.run(*submit, *job)
        assert completed.returncode == 0, completed.stdout + completed.stderr
        assert json.loads((shared / "run" / "summary.json").read_text())["step"] == 20

        wait_until(lambda: counts_file.read_text().endswith("\n1\n"), counts_file)
        history = [int(line) for line in counts_file.read_text().split()]
        assert 2 <= max(history) <= 3
