"""A Ray head node in separate processes with token authentication, started by `ray start`."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
RAY = [sys.executable, "-m", "ray.scripts.scripts"]
TOKEN = "a-secret-token-of-this-test-" + "0" * 32


class HeadNode:
    """Address of the head node for jobs, and the environment of an authorized user."""

    def __init__(self, address, environment):
        self.address, self.environment = address, environment

    def ray(self, *arguments, timeout=200, **environment):
        """Run `ray …` with the environment of an authorized user."""
        return subprocess.run(
            [*RAY, *arguments],
            env=self.environment | environment,
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def submit(self, *entrypoint, name, wait=True):
        """Run `ray job submit` as in the documentation."""
        options = ["--address", self.address, "--submission-id", name, *([] if wait else ["--no-wait"])]
        runtime_options = ["--runtime-env", "jobs/runtime_env.yaml", "--working-dir", "."]
        return self.ray("job", "submit", *options, *runtime_options, "--", *entrypoint)

    def get(self, path):
        """Request a path of the HTTP API of the head node with the token."""
        request = urllib.request.Request(self.address + path, headers={"Authorization": f"Bearer {TOKEN}"})
        with urllib.request.urlopen(request, timeout=20) as response:
            return json.load(response)

    def status(self, name):
        """Return PENDING, RUNNING, SUCCEEDED, STOPPED or FAILED."""
        return self.get(f"/api/jobs/{name}")["status"]


@contextmanager
def head_node(
    folder: Path, cpus: int, port: int = 0, options: Sequence[str] = (), settings: dict[str, str] | None = None
):
    """Start a head node with its files in `folder`, whose path must be short; end it with the block.

    Args:
        port: port of the cluster; 0 takes a free one.
        options: additional options of `ray start`.
        settings: environment variables of the head node.
    """
    token = folder / "token"
    token.write_text(TOKEN)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTEST_"))}
    environment |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
        "PATH": f"{Path(sys.executable).parent}:{environment['PATH']}",
    }
    free_port, dashboard, client = _free_ports(3)
    ports = {"port": port or free_port, "dashboard-port": dashboard, "ray-client-server-port": client}
    ports |= dict.fromkeys(("dashboard-agent-listen-port", "dashboard-agent-grpc-port", "metrics-export-port"), 0)
    command = [*RAY, "start", "--head", "--block", "--dashboard-host=127.0.0.1", f"--num-cpus={cpus}"]
    command += [f"--temp-dir={folder}/ray", "--object-store-memory=200000000", *options]
    command += [f"--{name}={number}" for name, number in ports.items()]
    with (folder / "head.log").open("w") as log:
        head_environment = environment | (settings or {})
        process = subprocess.Popen(command, env=head_environment, stdout=log, stderr=log, start_new_session=True)
    address = f"http://127.0.0.1:{dashboard}"
    try:
        _wait_until_ready(address, process, folder / "head.log")
        yield HeadNode(address, environment)
    finally:
        process.terminate()
        process.wait(180)


def _free_ports(count):
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def _wait_until_ready(address, process, log):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(f"{address}/api/version", timeout=2).close()
            return
        except urllib.error.HTTPError as error:
            if error.code in (401, 403):
                return
        except OSError:
            pass
        time.sleep(0.5)
    raise RuntimeError(f"the head node did not start: {log.read_text()[-2000:]}")
