"""The files in cluster/, held against Ray's own schema, KubeRay's fields, and what a run on these machines needs."""

import copy
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from kuberay_fields import METADATA, SPECS, schema_errors

CLUSTER = Path(__file__).resolve().parents[2] / "cluster"
LAUNCHER_FILES = sorted(path for path in CLUSTER.glob("*.yaml") if path.stem != "serve")
MANIFESTS = sorted((CLUSTER / "kuberay").glob("*.yaml"))
CLOUDS = [path for path in LAUNCHER_FILES if path.stem != "on-premises"]


def load(path):
    return yaml.safe_load(path.read_text())


def prepare(config):
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(copy.deepcopy(config))
    validate_config(config)
    return config


@pytest.fixture(params=LAUNCHER_FILES, ids=lambda path: path.stem)
def launcher_config(request):
    return load(request.param)


@pytest.fixture(params=MANIFESTS, ids=lambda path: path.stem)
def manifest(request):
    return load(request.param)


def cluster_spec(manifest):
    spec = manifest["spec"]
    return spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec


def start_commands(config):
    return [config[f"{kind}_start_ray_commands"] for kind in ("head", "worker")]


def test_launcher_accepts_config(launcher_config):
    """The Ray cluster launcher accepts each cluster file."""
    prepare(launcher_config)


def test_launcher_misspelled_key_raises(launcher_config):
    """The Ray cluster launcher rejects a misspelled key."""
    import jsonschema

    with pytest.raises(jsonschema.ValidationError, match="max_wokers"):
        prepare(launcher_config | {"max_wokers": 3})


def test_start_commands_are_valid_shell_and_ray_options(launcher_config):
    """Every start command is valid shell code and uses only options that Ray has."""
    from ray.scripts.scripts import start

    valid_options = {option for parameter in start.params for option in parameter.opts}
    for command in (line for lines in start_commands(launcher_config) for line in lines):
        assert subprocess.run(["bash", "-n", "-c", command]).returncode == 0
        if " start " in command:
            used_options = {word.split("=")[0] for word in shlex.split(command) if word.startswith("--")}
            assert used_options <= valid_options
    head, worker = (lines[-1] for lines in start_commands(launcher_config))
    assert "--head" in head
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in head
    assert "--address=$RAY_HEAD_IP:6379" in worker


def test_launcher_nodes_require_token_and_local_dashboard(launcher_config):
    """Every node requires the token, and the dashboard listens only on the head node itself."""
    for lines in start_commands(launcher_config):
        assert "RAY_AUTH_MODE=token" in lines[-1]
        assert "RAY_USAGE_STATS_ENABLED=0" in lines[-1]
    assert "--dashboard-host=127.0.0.1" in launcher_config["head_start_ray_commands"][-1]
    assert launcher_config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"


def test_on_premises_config_has_eight_required_nodes():
    """The on-premises file has eight nodes and requires all of them."""
    config = load(CLUSTER / "on-premises.yaml")
    assert len({config["provider"]["head_ip"], *config["provider"]["worker_ips"]}) == 8
    [node_type] = prepare(config)["available_node_types"].values()
    assert (node_type["min_workers"], node_type["max_workers"]) == (7, 7)


@pytest.mark.parametrize("path", CLOUDS, ids=lambda path: path.stem)
def test_cloud_config_idles_at_head_and_uses_spot_nodes(path):
    """An idle cloud cluster has only a small head node, and workers are spot instances."""
    config = prepare(load(path))
    node_types = config["available_node_types"]
    head = node_types.pop(config["head_node_type"])
    assert head["max_workers"] == 0
    assert head["resources"] == {"CPU": 0}
    assert "--num-cpus=0" in config["head_start_ray_commands"][-1]
    for node_type in node_types.values():
        assert node_type["min_workers"] == 0
        assert node_type["max_workers"] > 0
        assert node_type["resources"]["GPU"] == 8
        assert "spot" in str(node_type["node_config"]).lower()
    assert config["idle_timeout_minutes"] <= 15


@pytest.mark.parametrize("path", CLOUDS, ids=lambda path: path.stem)
def test_cloud_config_object_store_fits_shared_memory(path):
    """The object store is smaller than the shared memory of the container."""
    config = load(path)
    options = " ".join(config["docker"]["run_options"])
    shared_memory_bytes = int(re.search(r"--shm-size=(\d+)g", options)[1]) * 2**30
    object_store_bytes = int(re.search(r"--object-store-memory=(\d+)", config["worker_start_ray_commands"][-1])[1])
    assert object_store_bytes < shared_memory_bytes
    assert "--gpus all" in config["docker"]["worker_run_options"]


def test_manifest_uses_only_kuberay_fields(manifest):
    """A manifest uses only fields of the KubeRay schema."""
    assert manifest["apiVersion"] == "ray.io/v1"
    assert set(manifest) == {"apiVersion", "kind", "metadata", "spec"}
    assert schema_errors(manifest["metadata"], METADATA, "metadata") == []
    assert schema_errors(manifest["spec"], SPECS[manifest["kind"]]) == []


def test_schema_errors_finds_unknown_field_and_wrong_type(manifest):
    """An unknown field and a number in place of a string are reported."""
    cluster = cluster_spec(manifest)
    cluster["workerGroupSpecs"][0]["minReplica"] = 1
    cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] = 0
    errors = schema_errors(manifest["spec"], SPECS[manifest["kind"]])
    assert any("minReplica is not known" in line for line in errors)
    assert any("num-cpus is 0, not a string" in line for line in errors)


def test_manifest_has_token_version_and_no_idle_pods(manifest):
    """A manifest requires the token, has the installed Ray version and starts with no worker pod."""
    from importlib.metadata import version

    cluster = cluster_spec(manifest)
    assert cluster["authOptions"] == {"mode": "token"}
    assert tuple(map(int, cluster["rayVersion"].split("."))) >= (2, 52)
    assert cluster["rayVersion"].split(".")[:2] == version("ray").split(".")[:2]
    assert cluster["autoscalerOptions"]["version"] == "v2"
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] == group["replicas"] == 0


def test_manifest_shared_memory_fits_object_store(manifest):
    """The shared memory of a pod is a memory volume and large enough for the object store."""
    cluster = cluster_spec(manifest)
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        pod = group["template"]["spec"]
        volumes = {volume["name"]: volume["emptyDir"] for volume in pod["volumes"]}
        [container] = pod["containers"]
        assert {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]} == {"/dev/shm": "shm"}
        assert volumes["shm"]["medium"] == "Memory"
        size = int(volumes["shm"]["sizeLimit"].removesuffix("Gi")) * 2**30
        memory = int(container["resources"]["limits"]["memory"].removesuffix("Gi")) * 2**30
        assert int(group["rayStartParams"].get("object-store-memory", 0)) < size < memory
        assert container["resources"]["limits"] == container["resources"]["requests"]


def test_rayjob_uses_runtime_env_of_jobs():
    """The RayJob manifest uses the runtime environment of all jobs and the cluster of raycluster.yaml."""
    from bsq_ray.config import load_config

    spec = load(CLUSTER / "kuberay" / "rayjob.yaml")["spec"]
    settings = load(CLUSTER.parent / "jobs" / "runtime_env.yaml")
    assert yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"] == settings["env_vars"]
    words = shlex.split(spec["entrypoint"])
    assert (CLUSTER.parent / words[1]).exists()
    load_config(words[words.index("--config") + 1], [])
    assert "--resume" in words
    gpus = 8 * spec["rayClusterSpec"]["workerGroupSpecs"][0]["maxReplicas"]
    assert int(words[words.index("--workers") + 1]) <= gpus
    standalone_cluster = cluster_spec(load(CLUSTER / "kuberay" / "raycluster.yaml"))
    assert spec["rayClusterSpec"] == standalone_cluster


def run_start_script(*arguments, **environment):
    command = [str(CLUSTER / "start.sh"), *arguments]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)


def test_start_script_dry_run_prints_commands():
    """With --dry-run the start script prints the command of each host."""
    completed = run_start_script(
        "--dry-run", "me@10.0.0.1", "10.0.0.2", "10.0.0.3", BSQ_RAY="/venv/bin/ray", BSQ_NETWORK="ib0"
    )
    head, *workers = completed.stdout.splitlines()
    assert head.startswith("me@10.0.0.1: ")
    assert "/venv/bin/ray start --head --node-ip-address=10.0.0.1 --port=6379" in head
    assert sorted(line.split(":")[0] for line in workers) == ["10.0.0.2", "10.0.0.3"]
    for line in workers:
        address = line.split(":")[0]
        assert f"/venv/bin/ray start --address=10.0.0.1:6379 --node-ip-address={address}" in line
        assert "NCCL_SOCKET_IFNAME=ib0" in line


def test_start_script_matches_launcher_commands():
    """The start script runs the same commands as the cluster launcher."""
    launcher_config = load(CLUSTER / "on-premises.yaml")
    head, worker = run_start_script("--dry-run", "10.0.0.1", "10.0.0.2").stdout.splitlines()
    for script_command, launcher_commands in (
        (head, launcher_config["head_start_ray_commands"]),
        (worker, launcher_config["worker_start_ray_commands"]),
    ):
        words = set(shlex.split(launcher_commands[-1].replace("$RAY_HEAD_IP", "10.0.0.1")))
        words -= {"--autoscaling-config=~/ray_bootstrap_config.yaml"}
        assert words <= set(shlex.split(script_command))


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        ([], {}, "name the servers, the head first"),
        (["--strat", "a"], {}, "option --strat is not known"),
        (["10.0.0.1"], {"BSQ_TOKEN": "/nowhere"}, "there is no token in /nowhere"),
    ],
)
def test_start_script_wrong_arguments_fail(arguments, environment, message):
    """Wrong arguments end the start script with exit status 2 and a message."""
    completed = run_start_script(*arguments, **environment)
    assert completed.returncode == 2
    assert message in completed.stderr


@pytest.fixture
def fake_ssh(tmp_path):
    """A command that stands where ssh does: notes host, command and what it is told; the host 10.0.0.9 is down."""
    script = tmp_path / "ssh"
    script.write_text(
        f"""#!/bin/bash
[[ $1 == 10.0.0.9 ]] && exit 255
{{ echo "$2"; cat; }} > {tmp_path}/$1
"""
    )
    script.chmod(0o755)
    token = tmp_path / "token"
    token.write_text("secret-of-the-cluster")
    return tmp_path, {"BSQ_SSH": str(script), "BSQ_TOKEN": str(token)}


def test_start_script_sends_token_by_stdin(fake_ssh):
    """The start script sends the token through standard input, so that no command line contains it."""
    folder, environment = fake_ssh
    completed = run_start_script("10.0.0.1", "10.0.0.2", **environment)
    assert completed.returncode == 0, completed.stderr
    for host in ("10.0.0.1", "10.0.0.2"):
        command, stdin_text = (folder / host).read_text().split("\n", 1)
        assert stdin_text == "secret-of-the-cluster"
        assert "secret" not in command


def test_start_script_unreachable_host_is_named(fake_ssh):
    """An unreachable host is named, and the other hosts are started."""
    folder, environment = fake_ssh
    completed = run_start_script("10.0.0.1", "10.0.0.9", "10.0.0.2", **environment)
    assert completed.returncode == 1
    assert "failed on 10.0.0.9;" in completed.stderr
    assert (folder / "10.0.0.2").exists()


def test_start_script_join_starts_only_workers(fake_ssh):
    """With --join the start script starts only workers and leaves the head node alone."""
    folder, environment = fake_ssh
    assert run_start_script("--join", "10.0.0.1", "10.0.0.2", **environment).returncode == 0
    assert not (folder / "10.0.0.1").exists()
    assert "--address=10.0.0.1:6379" in (folder / "10.0.0.2").read_text()


def test_start_script_head_failure_starts_no_worker(fake_ssh):
    """If the head node does not start, no worker is started."""
    folder, environment = fake_ssh
    completed = run_start_script("10.0.0.9", "10.0.0.2", **environment)
    assert completed.returncode == 1
    assert "the head 10.0.0.9 did not start" in completed.stderr
    assert not (folder / "10.0.0.2").exists()
