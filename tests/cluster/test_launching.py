"""Servers of one's own, launched for real over ssh from a desk: by `start.sh`, and by the on-premises file.

desk 10.0.0.3 ─ssh─▶ head 10.0.0.1, server 10.0.0.2
"""

import shutil

import pytest
import yaml
from servers import REPOSITORY, TOKEN, virtual_nodes, wait_until

pytestmark = pytest.mark.slow
STORE = "200000000"
SSHD = """
Port 22
HostKey {home}/.ssh/host_key
AuthorizedKeysFile {home}/.ssh/authorized_keys
PermitRootLogin yes
StrictModes no
UsePAM no
PidFile none
"""
# The key of the desk is known everywhere, and the desk knows everyone's.
KEYS = """
mkdir -p ~/.ssh ~/.ray && chmod 700 ~/.ssh
ssh-keygen -q -t ed25519 -N '' -f ~/.ssh/host_key
cp /tmp/shared/id_ed25519.pub ~/.ssh/authorized_keys
mount -t tmpfs tmpfs /run && mkdir /run/sshd
"""
DESK = """
mkdir -p ~/.ssh ~/.ray && chmod 700 ~/.ssh
cp /tmp/shared/id_ed25519 ~/.ssh && chmod 600 ~/.ssh/id_ed25519
ssh-keyscan -t ed25519 10.0.0.1 10.0.0.2 2>/dev/null > ~/.ssh/known_hosts
printf %s $RAY_AUTH_TOKEN > ~/.ray/auth_token
"""


@pytest.fixture(scope="module")
def network():
    """(desk, head, server, shared folder); ssh goes from the desk to the two."""
    if not shutil.which("sshd", path="/usr/sbin:/usr/bin") or not shutil.which("ssh-keyscan"):
        pytest.skip("launching needs sshd, and there is none (openssh-server)")
    with virtual_nodes(3) as ([head, server, desk], shared):
        desk.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", "/tmp/shared/id_ed25519", check=True)
        for node in (head, server):
            node.run("bash", "-c", KEYS, check=True)
            (shared / "sshd.conf").write_text(SSHD.format(home=node.home))
            node.run("/usr/sbin/sshd", "-f", "/tmp/shared/sshd.conf", check=True)
        desk.run("bash", "-c", DESK, check=True)
        yield desk, head, server, shared


def ray_process_names(server):
    return [process.name() for process in server.processes() if process.name() in ("raylet", "gcs_server")]


def start_counting_nodes(head):
    counts_file = head.count_nodes()
    wait_until(lambda: counts_file.read_text(), counts_file)
    return counts_file


def test_start_script_starts_runs_job_and_stops_cluster(network, photo_folders):
    """The start script starts a cluster, adds a node, runs a job and stops the cluster."""
    desk, head, server, shared = network
    shutil.copytree(photo_folders[0], shared / "photos")
    start_result = desk.run("cluster/start.sh", "10.0.0.1", BSQ_STORE=STORE)
    assert start_result.returncode == 0, start_result.stdout + start_result.stderr
    counts_file = start_counting_nodes(head)
    assert counts_file.read_text() == "1\n"
    join_result = desk.run("cluster/start.sh", "--join", "10.0.0.1", "10.0.0.2", BSQ_STORE=STORE)
    assert join_result.returncode == 0, join_result.stdout + join_result.stderr
    wait_until(lambda: counts_file.read_text() == "1\n2\n", counts_file)

    desk.start("ssh", "-N", "-L", "8265:127.0.0.1:8265", "10.0.0.1", log=shared / "tunnel.log")
    job = ["python", "jobs/pack.py", "/tmp/shared/photos", "/tmp/shared/shards", "--max-side", "96"]
    submit = ["ray", "job", "submit", "--address", "http://127.0.0.1:8265", "--runtime-env", "jobs/runtime_env.yaml"]
    job_result = desk.run(*submit, "--working-dir", ".", "--", *job)
    assert job_result.returncode == 0, job_result.stdout + job_result.stderr
    assert (shared / "shards" / "manifest.parquet").exists()

    stop_result = desk.run("cluster/start.sh", "--stop", "10.0.0.1", "10.0.0.2")
    assert stop_result.returncode == 0, stop_result.stdout + stop_result.stderr
    assert [ray_process_names(node) for node in (head, server)] == [[], []]


def test_ray_up_and_down_on_premises_file(network):
    """The Ray cluster launcher starts and stops the cluster of the on-premises file."""
    if not shutil.which("rsync"):
        pytest.skip("`ray up` copies files with rsync, and there is none")
    desk, head, server, shared = network
    config = yaml.safe_load((REPOSITORY / "cluster" / "on-premises.yaml").read_text())
    config["provider"]["worker_ips"] = config["provider"]["worker_ips"][:1]
    config["auth"]["ssh_user"] = "root"
    config |= {"min_workers": 1, "max_workers": 1}
    text = yaml.safe_dump(config).replace("--object-store-memory=64000000000", f"--object-store-memory={STORE}")
    (shared / "on-premises.yaml").write_text(text)
    up_result = desk.run("ray", "up", "-y", "/tmp/shared/on-premises.yaml", RAY_UP_enable_autoscaler_v2="0")
    assert up_result.returncode == 0, up_result.stdout + up_result.stderr
    counts_file = start_counting_nodes(head)
    wait_until(lambda: counts_file.read_text().endswith("2\n"), counts_file)
    assert (head.run("cat", f"{head.home}/.ray/auth_token")).stdout == TOKEN
    down_result = desk.run("ray", "down", "-y", "/tmp/shared/on-premises.yaml")
    assert down_result.returncode == 0, down_result.stdout + down_result.stderr
    assert ray_process_names(head) == []
    # The others see that the head is gone, and end too.
    wait_until(lambda: ray_process_names(server) == [], counts_file)
