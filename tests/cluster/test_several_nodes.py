"""A run on two nodes with their own addresses: over a slow network that loses packets, and with a lost node."""

import json
import shutil

import pytest
from process_group import spawn_group
from small_runs import train_runs
from test_resume import assert_identical, load_weights
from virtual_nodes import virtual_nodes, wait_until

pytestmark = pytest.mark.slow
RUN_OVERRIDES = ["training.steps=30", "training.log_every=1", "training.checkpoint_every=5"]
# A node is declared dead after seconds, so that the test does not wait for a minute.
FAST_HEALTH_CHECKS = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "2000",
    "RAY_health_check_timeout_ms": "4000",
    "RAY_health_check_failure_threshold": "4",
    "GLOO_SOCKET_IFNAME": "eth0",
}


def start_ray(server, *options):
    size_options = ["--num-cpus=4", "--object-store-memory=200000000", "--include-log-monitor=false"]
    address_options = [f"--node-ip-address={server.address}", "--dashboard-host=127.0.0.1"]
    log = server.shared / f"ray-{server.address}.log"
    return server.start(
        "ray", "start", "--block", *options, *address_options, *size_options, log=log, **FAST_HEALTH_CHECKS
    )


def current_node_count(counts_file):
    """Return the number of nodes of the cluster."""
    lines = counts_file.read_text().split()
    return int(lines[-1]) if lines else 0


@pytest.fixture(scope="module")
def cluster(photo_shards):
    """(head, worker node, shared folder, count of nodes); latency 5 ms, 1 % packet loss."""
    with virtual_nodes(2, delay=0.005, loss=0.01) as (nodes, shared):
        head, worker_node = nodes
        shutil.copytree(photo_shards, shared / "shards")
        start_ray(head, "--head", "--port=6379")
        counts_file = head.start_counting_nodes()
        wait_until(lambda: current_node_count(counts_file) == 1, counts_file)
        start_ray(worker_node, "--address=10.0.0.1:6379")
        wait_until(lambda: current_node_count(counts_file) == 2, counts_file)
        yield head, worker_node, shared, counts_file


@pytest.fixture(scope="module")
def reference_run(photo_shards, tmp_path_factory):
    """Folder of the same run by two processes on one machine."""
    out = tmp_path_factory.mktemp("undisturbed")
    spawn_group(2, train_runs, photo_shards, out, {"run": RUN_OVERRIDES})
    return out


def train(head, shared, name):
    command = [
        "python",
        "tests/cluster/one_worker_per_node.py",
        "/tmp/shared/shards",
        f"/tmp/shared/{name}",
        *RUN_OVERRIDES,
    ]
    return head.start(*command, log=shared / f"{name}.log", PYTHONPATH="tests/training", **FAST_HEALTH_CHECKS)


def last_logged_step(shared, name):
    """Return the last logged step."""
    log = shared / name / "metrics.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    return max((json.loads(line)["step"] for line in lines), default=0)


def train_workers(server):
    return [process for process in server.processes() if "TrainWorker" in process.name()]


def test_cluster_slow_lossy_network_same_weights(cluster, reference_run):
    """A run over a slow network that loses packets gives the same weights."""
    head, worker_node, shared, _ = cluster
    run = train(head, shared, "run")
    wait_until(lambda: last_logged_step(shared, "run") >= 1 or run.poll() is not None, shared / "run.log")
    assert [len(train_workers(server)) for server in (head, worker_node)] == [1, 1], (shared / "run.log").read_text()
    assert run.wait(400) == 0, (shared / "run.log").read_text()
    assert json.loads((shared / "run" / "summary.json").read_text())["restarts"] == 0
    assert_identical(load_weights(shared, "run"), load_weights(reference_run, "run"))


@pytest.mark.long
def test_cluster_node_power_loss_run_recovers(cluster, reference_run):
    """A run that loses a node recovers when the node returns and gives the same weights."""
    head, worker_node, shared, counts_file = cluster
    head.switch.delay = head.switch.loss = 0
    run = train(head, shared, "cut")
    wait_until(lambda: last_logged_step(shared, "cut") >= 12 or run.poll() is not None, shared / "cut.log")
    assert len(train_workers(worker_node)) == 1, (shared / "cut.log").read_text()
    worker_node.cut_power()
    wait_until(lambda: current_node_count(counts_file) == 1, counts_file)
    assert run.poll() is None
    worker_node.boot()
    start_ray(worker_node, "--address=10.0.0.1:6379")
    assert run.wait(400) == 0, (shared / "cut.log").read_text()
    summary = json.loads((shared / "cut" / "summary.json").read_text())
    assert summary["restarts"] >= 1
    records = [json.loads(line) for line in (shared / "cut" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if record["kind"] == "training"] == list(range(1, 31))
    assert_identical(load_weights(shared, "cut"), load_weights(reference_run, "run"))
