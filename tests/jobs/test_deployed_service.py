"""`serve deploy cluster/serve.yaml` on a head node with token authentication, its models and address changed."""

import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
import pytest
import yaml
from head_node import REPOSITORY, head_node
from small_models import save_tokenizer

TOKEN = "the-token-of-the-service"


@pytest.fixture(scope="module")
def head():
    # Below /tmp, because the path of a socket may have no more than 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="head", dir="/tmp"))
    try:
        with head_node(folder, cpus=8, settings={"BSQ_RAY_TOKEN": TOKEN}) as running:
            yield running
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def deploy(head, file, port, models):
    deployed = yaml.safe_load((REPOSITORY / "cluster" / "serve.yaml").read_text())
    deployed["http_options"] = {"host": "127.0.0.1", "port": port}
    args = deployed["applications"][0]["args"]
    args["models"] = models
    for name in ("front", "tokenizer", "codec", "generator"):
        args[name] |= {"cpus": 0.5, "gpus": 0} if name != "front" else {"cpus": 0.5}
    file.write_text(yaml.safe_dump(deployed))
    command = "import sys; from ray.serve.scripts import cli; sys.exit(cli())"
    return subprocess.run(
        [sys.executable, "-c", command, "deploy", str(file)],
        env=head.environment | {"RAY_API_SERVER_ADDRESS": head.address, "RAY_DASHBOARD_ADDRESS": head.address},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip


@pytest.mark.slow
def test_the_file_is_deployed_and_asks_for_the_token(head, tmp_path, photo_folders):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    done = deploy(head, tmp_path / "serve.yaml", port, {"image": save_tokenizer(tmp_path / "model", seed=0)})
    assert done.returncode == 0, done.stderr
    url = f"http://127.0.0.1:{port}"
    assert loaded(url), head.get("/api/serve/applications/")
    photo = (photo_folders[1] / "coffee.png").read_bytes()
    assert httpx.post(f"{url}/v1/encode", content=photo).status_code == 401
    answer = httpx.post(f"{url}/v1/encode", content=photo, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=60)
    assert answer.status_code == 200
    assert answer.json()["grid"] == [1, 4, 4]


def loaded(url):
    for _ in range(120):
        try:
            if httpx.get(f"{url}/healthz").status_code == 200:
                return True
        except httpx.HTTPError:
            pass
        time.sleep(1)
    return False
