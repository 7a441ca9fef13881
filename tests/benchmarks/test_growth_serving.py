"""Growth of a shared replica with its number of models: `demo` tokenizers in one process, without Ray."""

import asyncio
import io
import time

import psutil
import pytest
import torch

from bsq_ray import Tokenizer, config
from bsq_ray.runtime.malloc import release_free_memory
from bsq_ray.serving.replicas.model_replica import ModelReplica
from bsq_ray.serving.service_config import Limits, SharedReplicas

pytestmark = pytest.mark.benchmark
_NUM_MODELS = (1, 2, 4, 8, 16, 32)
_IDLE_S = 20
_BENCHMARK = "growth-serving-cpu"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of untrained `demo` tokenizers (28 MB of weights), by name."""
    folder, run = tmp_path_factory.mktemp("models"), config.load_config("demo")
    for n in range(_NUM_MODELS[-1]):
        torch.manual_seed(n)
        Tokenizer(run.model).save_pretrained(str(folder / f"m{n}"), run)
    return {f"m{n}": str(folder / f"m{n}") for n in range(_NUM_MODELS[-1])}


def resident_mb():
    release_free_memory()
    return psutil.Process().memory_info().rss / 1e6


async def encode_and_decompress(replica, name, data):
    """Use both roles of a model; return the seconds until its first response."""
    start = time.perf_counter()
    await replica.call(name, "tokenizer", "encode", data)
    first_s = time.perf_counter() - start
    file = await replica.call(name, "codec", "compress", data)
    await replica.call(name, "codec", "decompress", file.data, "video/mp4")
    return first_s


def test_growth_of_a_shared_replica(models, photos, record):
    file = io.BytesIO()
    photos[0].resize((256, 256)).save(file, "PNG")

    async def run():
        replica = ModelReplica(models, SharedReplicas(max_num_models_per_replica=len(models)), Limits())
        names, memory_mb = list(models), [resident_mb()]
        for count in _NUM_MODELS:
            new = names[len(replica.loaded_models) : count]
            times_s = [await encode_and_decompress(replica, name, file.getvalue()) for name in new]
            memory_mb.append(resident_mb())
            start = time.perf_counter()
            for name in names[:count]:
                await replica.call(name, "tokenizer", "encode", file.getvalue())
            record(
                _BENCHMARK,
                str(count),
                first_response_s=sum(times_s) / len(times_s),
                next_response_s=(time.perf_counter() - start) / count,
                memory_mb=memory_mb[-1],
                further_model_mb=(memory_mb[-1] - memory_mb[1]) / (count - 1) if count > 1 else None,
            )

    asyncio.run(run())


def test_memory_after_models_were_idle(models, photos, record):
    """Idle models return their memory to the kernel."""
    file = io.BytesIO()
    photos[0].resize((256, 256)).save(file, "PNG")

    async def run():
        scaling = SharedReplicas(max_num_models_per_replica=16, model_idle_timeout_s=_IDLE_S)
        replica = ModelReplica(models, scaling, Limits())
        await encode_and_decompress(replica, "m0", file.getvalue())
        before_mb = resident_mb()
        for name in list(models)[:16]:
            await encode_and_decompress(replica, name, file.getvalue())
        peak_mb = resident_mb()
        while replica.loaded_models:
            await asyncio.sleep(0.2)
        await asyncio.sleep(1)
        record(_BENCHMARK, "16 idle", memory_mb=peak_mb, memory_after_idle_mb=resident_mb(), memory_before_mb=before_mb)

    asyncio.run(run())
