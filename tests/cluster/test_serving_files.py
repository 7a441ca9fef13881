"""The files that put the service on a cluster, held against the schemas of Ray Serve and of the service."""

from pathlib import Path

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from bsq_ray.config.loader import check_section
from bsq_ray.serving.service_config import TOKEN_VARIABLE, Settings

CLUSTER = Path(__file__).resolve().parents[2] / "cluster"
DEPLOYED = yaml.safe_load((CLUSTER / "serve.yaml").read_text())
SERVICE = yaml.safe_load((CLUSTER / "kuberay" / "rayservice.yaml").read_text())["spec"]


def settings_of(deployed):
    [application] = deployed["applications"]
    return check_section(application["args"], [], Settings, "args")


def test_ray_serve_and_the_service_accept_the_files():
    for deployed in (DEPLOYED, yaml.safe_load(SERVICE["serveConfigV2"])):
        ServeDeploySchema.model_validate(deployed)
        settings_of(deployed)
        module, _, name = deployed["applications"][0]["import_path"].partition(":")
        assert callable(getattr(__import__(module, fromlist=[name]), name))


def test_every_key_of_the_settings_is_written_out():
    [application] = DEPLOYED["applications"]
    assert set(application["args"]) == set(Settings.model_fields)
    assert set(application["args"]["limits"]) == set(Settings.model_fields["limits"].annotation.model_fields)


def test_a_misspelt_key_is_refused_with_the_right_one():
    [application] = DEPLOYED["applications"]
    with pytest.raises(ValueError, match=r"unknown key limits\.body_bm; did you mean limits\.body_mb\?"):
        check_section(application["args"], ["limits.body_bm=3"], Settings, "args")


def test_kubernetes_runs_the_same_application():
    assert yaml.safe_load(SERVICE["serveConfigV2"]) == DEPLOYED


def test_whoever_can_reach_the_port_needs_the_token():
    assert DEPLOYED["http_options"]["host"] == "0.0.0.0"
    assert settings_of(DEPLOYED).authentication
    cluster = SERVICE["rayClusterConfig"]
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        [container] = group["template"]["spec"]["containers"]
        [token] = [variable for variable in container["env"] if variable["name"] == TOKEN_VARIABLE]
        assert token["valueFrom"]["secretKeyRef"] == {"name": "bsq-serve", "key": "token"}


def test_a_pod_holds_the_first_replicas_of_all_models():
    """The application starts on one GPU pod, before anything has scaled."""
    settings = settings_of(DEPLOYED)
    sections = [settings.tokenizer, settings.codec, settings.codec, settings.generator]
    [group] = SERVICE["rayClusterConfig"]["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert sum(section.replicas * section.gpus for section in sections) <= 2 * int(limits["nvidia.com/gpu"])
    front = settings.front.replicas * settings.front.cpus
    assert front + sum(section.replicas * section.cpus for section in sections) <= int(limits["cpu"])
