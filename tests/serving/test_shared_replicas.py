"""Services of many models: the plan of their deployments, capacity, and small models that share a replica."""

import asyncio
import gc

import httpx
import numpy as np
import psutil
import pytest
import torch
from local_service import encode_image, save_models
from small_models import save_tokenizer

from bsq_ray import Codec
from bsq_ray.serving.deployment_plan import missing_capacity, plan_service
from bsq_ray.serving.replicas.model_metadata import stored_fields
from bsq_ray.serving.replicas.model_replica import ModelReplica, load_roles
from bsq_ray.serving.replicas.replica_runtime import ReplicaRuntime
from bsq_ray.serving.server import serve_app
from bsq_ray.serving.service_config import Batching, Limits, Settings, SharedReplicas

_MANY = 32


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of a tokenizer, a prior and a generator, by name."""
    return save_models(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def many_models(tmp_path_factory):
    """Folders of 32 small tokenizers with different weights, by name."""
    folder = tmp_path_factory.mktemp("many")
    return {f"m{n}": save_tokenizer(folder / f"m{n}", seed=n) for n in range(_MANY)}


def deployment_models(settings):
    return {deployment.name: list(deployment.model_urls) for deployment in plan_service(settings).deployments}


def test_plan_service_one_deployment_per_model(models):
    """All roles of a model are in one deployment, so a tokenizer takes one process."""
    plan = plan_service(Settings(models=models))
    names = {deployment.name: list(deployment.model_urls) for deployment in plan.deployments}
    assert names == {"tokenizer-small": ["small"], "codec-prior": ["prior"], "generator-generator": ["generator"]}
    assert plan.kinds["generator"].stage == "masked-lm"
    assert plan.resources(Settings(models=models)) == {"CPU": 0.25 + 3 * 0.5, "GPU": 0}


def test_plan_service_small_models_share(many_models):
    """From `min_models` small models on they share a deployment; larger models keep their own."""
    assert deployment_models(Settings(models=many_models)) == {"shared": list(many_models)}
    few = dict(list(many_models.items())[:7])
    assert len(deployment_models(Settings(models=few))) == 7
    assert deployment_models(Settings(models=few, shared=SharedReplicas(min_models=7))) == {"shared": list(few)}
    assert len(deployment_models(Settings(models=many_models, shared=SharedReplicas(max_model_mb=0)))) == _MANY


def test_missing_capacity_names_resource_and_remedy():
    assert not missing_capacity({"CPU": 4, "GPU": 0}, {"CPU": 4})
    assert "needs 4.75 CPUs and the cluster has 4; serve fewer models" in missing_capacity(
        {"CPU": 4.75, "GPU": 0}, {"CPU": 4}
    )
    assert "needs 2 GPUs and the cluster has 0" in missing_capacity({"CPU": 1, "GPU": 2}, {"CPU": 4})


def test_serve_app_without_capacity_raises(ray_local, many_models):
    """A service that does not fit is rejected before anything of it starts."""
    settings = Settings(models=many_models, authentication=False, shared=SharedReplicas(max_model_mb=0))
    with (
        pytest.raises(ValueError, match=r"needs 16\.25 CPUs and the cluster has 4"),
        serve_app(settings, "127.0.0.1", 0),
    ):
        pass


def test_stored_fields_equal_those_of_loaded_models(models):
    """The entries of `GET /v1/models` are the same before and after a model is loaded."""
    runtime = ReplicaRuntime.create(Batching(max_batch_size=2), Limits())
    for url in models.values():
        roles = load_roles(url, runtime)
        fields = {}
        for role in roles.values():
            fields |= asyncio.run(role.metadata())
        assert stored_fields(url) == fields


def test_load_roles_tokenizer_and_codec_share_the_encoder(models, photos):
    """Decompressing converts the decoder of the codec to fp64; that of the tokenizer stays as it is."""
    roles = load_roles(models["small"], ReplicaRuntime.create(Batching(max_batch_size=2), Limits()))
    tokenizer, codec = roles["tokenizer"].tokenizer, roles["codec"]._engine.codec
    assert codec.tokenizer.encoder is tokenizer.encoder
    image = photos[0].resize((100, 80))
    data = codec.compress(image).data
    reference = Codec.from_pretrained(models["small"])
    assert data == reference.compress(image).data
    assert np.array_equal(np.array(codec.decompress(data)), np.array(reference.decompress(data)))
    assert tokenizer.last_layer.dtype == torch.float32


async def encode_with(replica, name, data):
    tokens = await replica.call(name, "tokenizer", "encode", data)
    return tokens.packed


def test_shared_replica_loads_replaces_and_unloads(many_models, photos):
    """Each response is that of its own model, in any order and with few models in memory."""
    urls = dict(list(many_models.items())[:4])
    data = encode_image(photos[0].resize((32, 32)))

    async def run():
        scaling = SharedReplicas(max_num_models_per_replica=2, model_idle_timeout_s=0.2, max_batch_size=2)
        replica = ModelReplica(urls, scaling, Limits())
        assert (await replica.call("m0", "tokenizer", "metadata"))["image_size"] == 32
        assert replica.loaded_models == []
        order = [*urls, *urls]
        packed = await asyncio.gather(*(encode_with(replica, name, data) for name in order))
        assert len(replica.loaded_models) <= 2
        await asyncio.sleep(0.5)
        assert replica.loaded_models == []
        return dict(zip(order[4:], packed[4:], strict=True)), packed[:4]

    by_model, first = asyncio.run(run())
    assert list(by_model.values()) == first
    for name, packed in by_model.items():
        runtime = ReplicaRuntime.create(Batching(max_batch_size=2), Limits())
        assert asyncio.run(load_roles(urls[name], runtime)["tokenizer"].encode(data)).packed == packed
    assert len(set(by_model.values())) == 4


def test_shared_replica_damaged_model_returns_503(many_models, tmp_path, photos):
    """A model that cannot be loaded is an error of its requests, not of the other models."""
    broken = save_tokenizer(tmp_path / "broken", seed=99)
    weights = tmp_path / "broken" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    data = encode_image(photos[0].resize((32, 32)))

    async def run():
        replica = ModelReplica({"m0": many_models["m0"], "broken": broken}, SharedReplicas(max_batch_size=2), Limits())
        for _ in range(2):
            with pytest.raises(Exception, match="the model broken cannot be loaded") as error:
                await encode_with(replica, "broken", data)
            assert error.value.status == 503
        assert await encode_with(replica, "m0", data)

    asyncio.run(run())


def test_shared_replica_memory_per_model_is_small(many_models, photos):
    """Further small models take little more memory than their weights (limit of the specification: 150 MB)."""
    data = encode_image(photos[0].resize((32, 32)))

    async def run():
        replica = ModelReplica(many_models, SharedReplicas(max_batch_size=2), Limits())
        await encode_with(replica, "m0", data)
        gc.collect()
        before = psutil.Process().memory_info().rss
        for n in range(1, 9):
            await encode_with(replica, f"m{n}", data)
        assert len(replica.loaded_models) == 9
        return (psutil.Process().memory_info().rss - before) / 8 / 1e6

    assert asyncio.run(run()) < 50


@pytest.mark.slow
@pytest.mark.long
def test_service_of_32_models_on_a_small_ray(ray_local, many_models, photos):
    """32 models on 4 CPUs: `/healthz` responds while they start, and each model responds with its own tokens."""
    health = []

    def on_started(server):
        health.append(httpx.get(f"{server.url}healthz", timeout=10).status_code)

    settings = Settings(models=many_models, authentication=False)
    data = encode_image(photos[0].resize((32, 32)))
    with serve_app(settings, "127.0.0.1", 0, on_started=on_started) as server:
        assert health[0] in (200, 503)
        with httpx.Client(base_url=server.url, timeout=120) as client:
            models = client.get("/v1/models").json()["models"]
            assert [model["name"] for model in models if model["ready"]] == list(many_models)
            responses = set()
            for name in many_models:
                response = client.post("/v1/encode", params={"model": name}, content=data)
                assert response.status_code == 200, response.text
                assert response.json()["model"] == name
                responses.add(response.content)
            assert len(responses) == _MANY
        replicas = [
            process.memory_info().rss / 1e6
            for process in psutil.process_iter(["cmdline"])
            if "ServeReplica:bsq:shared" in " ".join(process.info["cmdline"] or [])
        ]
        assert len(replicas) == 1
        assert replicas[0] < 600 + 16 * 150
