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
        with head_node(folder, cpus=8, settings={"BSQ_RAY_TOKEN": TOKEN}) as head_process:
            yield head_process
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def deploy(head, file, port, models):
    serve_config = yaml.safe_load((REPOSITORY / "cluster" / "serve.yaml").read_text())
    serve_config["http_options"] = {"host": "127.0.0.1", "port": port}
    args = serve_config["applications"][0]["args"]
    args["models"] = models
    for name in ("front", "tokenizer", "codec", "generator"):
        args[name] |= {"cpus": 0.5, "gpus": 0} if name != "front" else {"cpus": 0.5}
    file.write_text(yaml.safe_dump(serve_config))
    command = "import sys; from ray.serve.scripts import cli; sys.exit(cli())"
    return subprocess.run(
        [sys.executable, "-c", command, "deploy", str(file)],
        env=head.environment | {"RAY_API_SERVER_ADDRESS": head.address, "RAY_DASHBOARD_ADDRESS": head.address},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip


@pytest.mark.slow
def test_deployed_serve_yaml_requires_token(head, tmp_path, photo_folders):
    """The deployed application requires the token."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    result = deploy(head, tmp_path / "serve.yaml", port, {"image": save_tokenizer(tmp_path / "model", seed=0)})
    assert result.returncode == 0, result.stderr
    url = f"http://127.0.0.1:{port}"
    assert is_loaded(url), head.get("/api/serve/applications/")
    photo = (photo_folders[1] / "coffee.png").read_bytes()
    assert httpx.post(f"{url}/v1/encode", content=photo).status_code == 401
    response = httpx.post(f"{url}/v1/encode", content=photo, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=60)
    assert response.status_code == 200
    assert response.json()["grid"] == [1, 4, 4]


def is_loaded(url):
    for _ in range(120):
        try:
            if httpx.get(f"{url}/healthz").status_code == 200:
                return True
        except httpx.HTTPError:
            pass
        time.sleep(1)
    return False
