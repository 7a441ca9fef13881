"""Servers of one's own, launched for real over ssh from a desk: by `start.sh`, and by the on-premises file.

desk 10.0.0.3 ─ssh─▶ head 10.0.0.1, server 10.0.0.2
"""

import shutil

import pytest
import yaml
from servers import REPOSITORY, TOKEN, servers, wait_until

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
    with servers(3) as ([head, server, desk], shared):
        desk.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", "/tmp/shared/id_ed25519", check=True)
        for each in (head, server):
            each.run("bash", "-c", KEYS, check=True)
            (shared / "sshd.conf").write_text(SSHD.format(home=each.home))
            each.run("/usr/sbin/sshd", "-f", "/tmp/shared/sshd.conf", check=True)
        desk.run("bash", "-c", DESK, check=True)
        yield desk, head, server, shared


def ray_processes(server):
    return [process.name() for process in server.processes() if process.name() in ("raylet", "gcs_server")]


def counted_nodes(head):
    counted = head.count_nodes()
    wait_until(lambda: counted.read_text(), counted)
    return counted


def test_the_start_script_starts_a_cluster_that_runs_a_job_and_stops_it(network, photo_folders):
    desk, head, server, shared = network
    shutil.copytree(photo_folders[0], shared / "photos")
    started = desk.run("cluster/start.sh", "10.0.0.1", BSQ_STORE=STORE)
    assert started.returncode == 0, started.stdout + started.stderr
    counted = counted_nodes(head)
    assert counted.read_text() == "1\n"
    joined = desk.run("cluster/start.sh", "--join", "10.0.0.1", "10.0.0.2", BSQ_STORE=STORE)
    assert joined.returncode == 0, joined.stdout + joined.stderr
    wait_until(lambda: counted.read_text() == "1\n2\n", counted)

    desk.start("ssh", "-N", "-L", "8265:127.0.0.1:8265", "10.0.0.1", log=shared / "tunnel.log")
    job = ["python", "jobs/pack.py", "/tmp/shared/photos", "/tmp/shared/shards", "--max-side", "96"]
    submit = ["ray", "job", "submit", "--address", "http://127.0.0.1:8265", "--runtime-env", "jobs/runtime_env.yaml"]
    done = desk.run(*submit, "--working-dir", ".", "--", *job)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (shared / "shards" / "manifest.parquet").exists()

    stopped = desk.run("cluster/start.sh", "--stop", "10.0.0.1", "10.0.0.2")
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    assert [ray_processes(each) for each in (head, server)] == [[], []]


def test_the_launcher_starts_what_the_on_premises_file_says_and_ends_it(network):
    if not shutil.which("rsync"):
        pytest.skip("`ray up` copies files with rsync, and there is none")
    desk, head, server, shared = network
    config = yaml.safe_load((REPOSITORY / "cluster" / "on-premises.yaml").read_text())
    config["provider"]["worker_ips"] = config["provider"]["worker_ips"][:1]
    config["auth"]["ssh_user"] = "root"
    config |= {"min_workers": 1, "max_workers": 1}
    text = yaml.safe_dump(config).replace("--object-store-memory=64000000000", f"--object-store-memory={STORE}")
    (shared / "on-premises.yaml").write_text(text)
    launched = desk.run("ray", "up", "-y", "/tmp/shared/on-premises.yaml", RAY_UP_enable_autoscaler_v2="0")
    assert launched.returncode == 0, launched.stdout + launched.stderr
    counted = counted_nodes(head)
    wait_until(lambda: counted.read_text().endswith("2\n"), counted)
    assert (head.run("cat", f"{head.home}/.ray/auth_token")).stdout == TOKEN
    ended = desk.run("ray", "down", "-y", "/tmp/shared/on-premises.yaml")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ray_processes(head) == []
    # The others see that the head is gone, and end too.
    wait_until(lambda: ray_processes(server) == [], counted)
