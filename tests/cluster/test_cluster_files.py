"""The files in cluster/, held against Ray's own schema, KubeRay's fields, and what a run on these machines needs."""

import copy
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from kuberay_fields import METADATA, SPECS, faults

CLUSTER = Path(__file__).resolve().parents[2] / "cluster"
LAUNCHED = sorted(path for path in CLUSTER.glob("*.yaml") if path.stem != "serve")
MANIFESTS = sorted((CLUSTER / "kuberay").glob("*.yaml"))
CLOUDS = [path for path in LAUNCHED if path.stem != "on-premises"]


def load(path):
    return yaml.safe_load(path.read_text())


def prepared(config):
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(copy.deepcopy(config))
    validate_config(config)
    return config


@pytest.fixture(params=LAUNCHED, ids=lambda path: path.stem)
def launched(request):
    return load(request.param)


@pytest.fixture(params=MANIFESTS, ids=lambda path: path.stem)
def manifest(request):
    return load(request.param)


def clusters(manifest):
    spec = manifest["spec"]
    return spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec


def start_commands(config):
    return [config[f"{kind}_start_ray_commands"] for kind in ("head", "worker")]


def test_the_launcher_accepts_the_file(launched):
    prepared(launched)


def test_the_launcher_refuses_a_misspelt_key(launched):
    import jsonschema

    with pytest.raises(jsonschema.ValidationError, match="max_wokers"):
        prepared(launched | {"max_wokers": 3})


def test_every_start_command_is_shell_and_known_to_ray(launched):
    from ray.scripts.scripts import start

    known = {option for parameter in start.params for option in parameter.opts}
    for command in (line for lines in start_commands(launched) for line in lines):
        assert subprocess.run(["bash", "-n", "-c", command]).returncode == 0
        if " start " in command:
            given = {word.split("=")[0] for word in shlex.split(command) if word.startswith("--")}
            assert given <= known
    head, worker = (lines[-1] for lines in start_commands(launched))
    assert "--head" in head
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in head
    assert "--address=$RAY_HEAD_IP:6379" in worker


def test_every_machine_asks_for_the_token_and_only_the_head_itself_sees_the_dashboard(launched):
    for lines in start_commands(launched):
        assert "RAY_AUTH_MODE=token" in lines[-1]
        assert "RAY_USAGE_STATS_ENABLED=0" in lines[-1]
    assert "--dashboard-host=127.0.0.1" in launched["head_start_ray_commands"][-1]
    assert launched["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"


def test_the_servers_of_ones_own_are_eight_and_all_wanted():
    config = load(CLUSTER / "on-premises.yaml")
    assert len({config["provider"]["head_ip"], *config["provider"]["worker_ips"]}) == 8
    [kind] = prepared(config)["available_node_types"].values()
    assert (kind["min_workers"], kind["max_workers"]) == (7, 7)


@pytest.mark.parametrize("path", CLOUDS, ids=lambda path: path.stem)
def test_a_cloud_costs_one_small_machine_when_idle_and_trains_on_spot_machines(path):
    config = prepared(load(path))
    kinds = config["available_node_types"]
    head = kinds.pop(config["head_node_type"])
    assert head["max_workers"] == 0
    assert head["resources"] == {"CPU": 0}
    assert "--num-cpus=0" in config["head_start_ray_commands"][-1]
    for kind in kinds.values():
        assert kind["min_workers"] == 0
        assert kind["max_workers"] > 0
        assert kind["resources"]["GPU"] == 8
        assert "spot" in str(kind["node_config"]).lower()
    assert config["idle_timeout_minutes"] <= 15


@pytest.mark.parametrize("path", CLOUDS, ids=lambda path: path.stem)
def test_the_object_store_fits_into_the_shared_memory_of_the_container(path):
    config = load(path)
    options = " ".join(config["docker"]["run_options"])
    shared = int(re.search(r"--shm-size=(\d+)g", options)[1]) * 2**30
    store = int(re.search(r"--object-store-memory=(\d+)", config["worker_start_ray_commands"][-1])[1])
    assert store < shared
    assert "--gpus all" in config["docker"]["worker_run_options"]


def test_a_manifest_uses_only_fields_that_kuberay_knows(manifest):
    assert manifest["apiVersion"] == "ray.io/v1"
    assert set(manifest) == {"apiVersion", "kind", "metadata", "spec"}
    assert faults(manifest["metadata"], METADATA, "metadata") == []
    assert faults(manifest["spec"], SPECS[manifest["kind"]]) == []


def test_an_unknown_field_and_a_number_for_a_string_are_found(manifest):
    cluster = clusters(manifest)
    cluster["workerGroupSpecs"][0]["minReplica"] = 1
    cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] = 0
    found = faults(manifest["spec"], SPECS[manifest["kind"]])
    assert any("minReplica is not known" in line for line in found)
    assert any("num-cpus is 0, not a string" in line for line in found)


def test_a_manifest_keeps_the_token_the_version_and_no_idle_pods(manifest):
    from importlib.metadata import version

    cluster = clusters(manifest)
    assert cluster["authOptions"] == {"mode": "token"}
    assert tuple(map(int, cluster["rayVersion"].split("."))) >= (2, 52)
    assert cluster["rayVersion"].split(".")[:2] == version("ray").split(".")[:2]
    assert cluster["autoscalerOptions"]["version"] == "v2"
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] == group["replicas"] == 0


def test_the_shared_memory_of_a_pod_is_memory_and_holds_the_object_store(manifest):
    cluster = clusters(manifest)
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


def test_the_job_of_kubernetes_runs_with_the_environment_of_all_jobs():
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
    alone = clusters(load(CLUSTER / "kuberay" / "raycluster.yaml"))
    assert spec["rayClusterSpec"] == alone


def start_script(*arguments, **environment):
    command = [str(CLUSTER / "start.sh"), *arguments]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)


def test_the_start_script_says_what_it_would_run():
    done = start_script("--dry-run", "me@10.0.0.1", "10.0.0.2", "10.0.0.3", BSQ_RAY="/venv/bin/ray", BSQ_NETWORK="ib0")
    head, *workers = done.stdout.splitlines()
    assert head.startswith("me@10.0.0.1: ")
    assert "/venv/bin/ray start --head --node-ip-address=10.0.0.1 --port=6379" in head
    assert sorted(line.split(":")[0] for line in workers) == ["10.0.0.2", "10.0.0.3"]
    for line in workers:
        address = line.split(":")[0]
        assert f"/venv/bin/ray start --address=10.0.0.1:6379 --node-ip-address={address}" in line
        assert "NCCL_SOCKET_IFNAME=ib0" in line


def test_the_start_script_starts_what_the_launcher_starts():
    launched = load(CLUSTER / "on-premises.yaml")
    head, worker = start_script("--dry-run", "10.0.0.1", "10.0.0.2").stdout.splitlines()
    for ours, theirs in ((head, launched["head_start_ray_commands"]), (worker, launched["worker_start_ray_commands"])):
        words = set(shlex.split(theirs[-1].replace("$RAY_HEAD_IP", "10.0.0.1")))
        words -= {"--autoscaling-config=~/ray_bootstrap_config.yaml"}
        assert words <= set(shlex.split(ours))


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        ([], {}, "name the servers, the head first"),
        (["--strat", "a"], {}, "option --strat is not known"),
        (["10.0.0.1"], {"BSQ_TOKEN": "/nowhere"}, "there is no token in /nowhere"),
    ],
)
def test_the_start_script_refuses_a_wrong_call(arguments, environment, message):
    done = start_script(*arguments, **environment)
    assert done.returncode == 2
    assert message in done.stderr


@pytest.fixture
def recorder(tmp_path):
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


def test_the_token_travels_through_standard_input_and_stands_in_no_command(recorder):
    folder, environment = recorder
    done = start_script("10.0.0.1", "10.0.0.2", **environment)
    assert done.returncode == 0, done.stderr
    for host in ("10.0.0.1", "10.0.0.2"):
        command, told = (folder / host).read_text().split("\n", 1)
        assert told == "secret-of-the-cluster"
        assert "secret" not in command


def test_a_server_that_does_not_answer_is_named_and_the_others_are_started(recorder):
    folder, environment = recorder
    done = start_script("10.0.0.1", "10.0.0.9", "10.0.0.2", **environment)
    assert done.returncode == 1
    assert "failed on 10.0.0.9;" in done.stderr
    assert (folder / "10.0.0.2").exists()


def test_a_server_joins_a_head_that_is_left_alone(recorder):
    folder, environment = recorder
    assert start_script("--join", "10.0.0.1", "10.0.0.2", **environment).returncode == 0
    assert not (folder / "10.0.0.1").exists()
    assert "--address=10.0.0.1:6379" in (folder / "10.0.0.2").read_text()


def test_without_its_head_no_server_is_started(recorder):
    folder, environment = recorder
    done = start_script("10.0.0.9", "10.0.0.2", **environment)
    assert done.returncode == 1
    assert "the head 10.0.0.9 did not start" in done.stderr
    assert not (folder / "10.0.0.2").exists()
