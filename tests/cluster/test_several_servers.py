"""A run over two servers with addresses of their own: over a slow line that loses packets, and with a server lost."""

import json
import shutil

import pytest
from process_group import spawn_group
from servers import servers, wait_until
from small_runs import train_runs
from test_resume import assert_identical, weights

pytestmark = pytest.mark.slow
LONG = ["training.steps=30", "training.log_every=1", "training.checkpoint_every=5"]
# A server is given up after seconds, so that the test does not wait for a minute.
QUICK = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "2000",
    "RAY_health_check_timeout_ms": "4000",
    "RAY_health_check_failure_threshold": "4",
    "GLOO_SOCKET_IFNAME": "eth0",
}


def start_ray(server, *options):
    size = ["--num-cpus=4", "--object-store-memory=200000000", "--include-log-monitor=false"]
    where = [f"--node-ip-address={server.address}", "--dashboard-host=127.0.0.1"]
    log = server.shared / f"ray-{server.address}.log"
    return server.start("ray", "start", "--block", *options, *where, *size, log=log, **QUICK)


def now(counted):
    """Nodes of the cluster at present."""
    lines = counted.read_text().split()
    return int(lines[-1]) if lines else 0


@pytest.fixture(scope="module")
def cluster(photo_shards):
    """(head, other server, shared folder, count of nodes): five milliseconds each way, one packet in a hundred lost."""
    with servers(2, delay=0.005, loss=0.01) as (both, shared):
        head, other = both
        shutil.copytree(photo_shards, shared / "shards")
        start_ray(head, "--head", "--port=6379")
        counted = head.count_nodes()
        wait_until(lambda: now(counted) == 1, counted)
        start_ray(other, "--address=10.0.0.1:6379")
        wait_until(lambda: now(counted) == 2, counted)
        yield head, other, shared, counted


@pytest.fixture(scope="module")
def undisturbed(photo_shards, tmp_path_factory):
    """Folder of the same run by two processes that talk to each other directly."""
    out = tmp_path_factory.mktemp("undisturbed")
    spawn_group(2, train_runs, photo_shards, out, {"run": LONG})
    return out


def train(head, shared, name):
    command = ["python", "tests/cluster/one_worker_per_server.py", "/tmp/shared/shards", f"/tmp/shared/{name}", *LONG]
    return head.start(*command, log=shared / f"{name}.log", PYTHONPATH="tests/training", **QUICK)


def reached(shared, name):
    """The last step that was logged."""
    log = shared / name / "metrics.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    return max((json.loads(line)["step"] for line in lines), default=0)


def workers(server):
    return [process for process in server.processes() if "TrainWorker" in process.name()]


def test_a_slow_line_that_loses_packets_changes_nothing(cluster, undisturbed):
    head, other, shared, _ = cluster
    run = train(head, shared, "run")
    wait_until(lambda: reached(shared, "run") >= 1 or run.poll() is not None, shared / "run.log")
    assert [len(workers(server)) for server in (head, other)] == [1, 1], (shared / "run.log").read_text()
    assert run.wait(400) == 0, (shared / "run.log").read_text()
    assert json.loads((shared / "run" / "summary.json").read_text())["restarts"] == 0
    assert_identical(weights(shared, "run"), weights(undisturbed, "run"))


def test_a_server_that_loses_power_comes_back_and_the_run_ends_as_if_nothing_had_happened(cluster, undisturbed):
    head, other, shared, counted = cluster
    head.switch.delay = head.switch.loss = 0
    run = train(head, shared, "cut")
    wait_until(lambda: reached(shared, "cut") >= 12 or run.poll() is not None, shared / "cut.log")
    assert len(workers(other)) == 1, (shared / "cut.log").read_text()
    other.cut_power()
    wait_until(lambda: now(counted) == 1, counted)
    assert run.poll() is None
    other.boot()
    start_ray(other, "--address=10.0.0.1:6379")
    assert run.wait(400) == 0, (shared / "cut.log").read_text()
    summary = json.loads((shared / "cut" / "summary.json").read_text())
    assert summary["restarts"] >= 1
    records = [json.loads(line) for line in (shared / "cut" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if record["kind"] == "training"] == list(range(1, 31))
    assert_identical(weights(shared, "cut"), weights(undisturbed, "run"))
