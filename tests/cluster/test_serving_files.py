"""The files that put the service on a cluster, held against the schemas of Ray Serve and of the service."""

from pathlib import Path

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from bsq_ray.config.loader import validate_mapping
from bsq_ray.serving.service_config import TOKEN_VARIABLE, Settings

CLUSTER = Path(__file__).resolve().parents[2] / "cluster"
SERVE_CONFIG = yaml.safe_load((CLUSTER / "serve.yaml").read_text())
SERVICE = yaml.safe_load((CLUSTER / "kuberay" / "rayservice.yaml").read_text())["spec"]


def parse_application_settings(serve_config):
    [application] = serve_config["applications"]
    return validate_mapping(application["args"], [], Settings, "args")


def test_serving_files_validate_with_both_schemas():
    """Ray Serve and the service accept the deployment files."""
    for serve_config in (SERVE_CONFIG, yaml.safe_load(SERVICE["serveConfigV2"])):
        ServeDeploySchema.model_validate(serve_config)
        parse_application_settings(serve_config)
        module, _, name = serve_config["applications"][0]["import_path"].partition(":")
        assert callable(getattr(__import__(module, fromlist=[name]), name))


def test_serve_yaml_contains_every_setting():
    """The deployment file contains every setting."""
    [application] = SERVE_CONFIG["applications"]
    assert set(application["args"]) == set(Settings.model_fields)
    assert set(application["args"]["limits"]) == set(Settings.model_fields["limits"].annotation.model_fields)


def test_misspelled_key_error_suggests_correct_key():
    """A misspelled key raises an error that suggests the correct one."""
    [application] = SERVE_CONFIG["applications"]
    with pytest.raises(ValueError, match=r"unknown key limits\.body_bm; did you mean limits\.body_mb\?"):
        validate_mapping(application["args"], ["limits.body_bm=3"], Settings, "args")


def test_rayservice_runs_same_application():
    """The RayService runs the same application as serve.yaml."""
    assert yaml.safe_load(SERVICE["serveConfigV2"]) == SERVE_CONFIG


def test_public_port_requires_token():
    """A service on a public port requires the token on every node."""
    assert SERVE_CONFIG["http_options"]["host"] == "0.0.0.0"
    assert parse_application_settings(SERVE_CONFIG).authentication
    cluster = SERVICE["rayClusterConfig"]
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        [container] = group["template"]["spec"]["containers"]
        [token] = [variable for variable in container["env"] if variable["name"] == TOKEN_VARIABLE]
        assert token["valueFrom"]["secretKeyRef"] == {"name": "bsq-serve", "key": "token"}


def test_one_pod_fits_minimum_replicas():
    """The application starts on one GPU pod, before anything has scaled."""
    settings = parse_application_settings(SERVE_CONFIG)
    replica_configs = [settings.tokenizer, settings.codec, settings.codec, settings.generator]
    [group] = SERVICE["rayClusterConfig"]["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert sum(scaling_config.replicas * scaling_config.gpus for scaling_config in replica_configs) <= 2 * int(
        limits["nvidia.com/gpu"]
    )
    ingress_cpus = settings.front.replicas * settings.front.cpus
    assert ingress_cpus + sum(
        scaling_config.replicas * scaling_config.cpus for scaling_config in replica_configs
    ) <= int(limits["cpu"])
