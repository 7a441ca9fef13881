"""Models of a shared replica: loaded by the first request, replaced and unloaded when they are idle."""

import asyncio

import pytest

from bsq_ray.serving.replicas.model_cache import ModelCache


class Loads:
    """A function that loads models by name, with a count of its calls and of the models that were unloaded."""

    def __init__(self, seconds=0.0):
        self.names, self.num_unloaded, self.seconds = [], 0, seconds

    async def __call__(self, name):
        self.names.append(name)
        await asyncio.sleep(self.seconds)
        if name == "damaged":
            raise ValueError("damaged")
        return f"model {name}"

    def unload(self):
        self.num_unloaded += 1


def make_cache(loads, max_models=2, idle_timeout_s=60.0):
    return ModelCache(loads, loads.unload, max_models=max_models, idle_timeout_s=idle_timeout_s)


async def use(cache, name):
    async with cache.use(name) as model:
        return model


def test_use_loads_each_model_once():
    async def run():
        loads = Loads(seconds=0.01)
        cache = make_cache(loads)
        models = await asyncio.gather(*(use(cache, name) for name in "ababab"))
        assert models == ["model a", "model b"] * 3
        assert sorted(loads.names) == ["a", "b"]

    asyncio.run(run())


def test_use_replaces_the_model_idle_for_longest():
    async def run():
        loads = Loads()
        cache = make_cache(loads)
        for name in "abac":
            await use(cache, name)
        assert cache.names == ["a", "c"]
        assert loads.num_unloaded == 1

    asyncio.run(run())


def test_use_waits_while_all_models_are_in_use():
    """The limit also holds under load; a request never takes a model away from another one."""

    async def run():
        loads = Loads()
        cache = make_cache(loads, max_models=1)
        async with cache.use("a"):
            waiting = asyncio.create_task(use(cache, "b"))
            await asyncio.sleep(0.01)
            assert cache.names == ["a"]
        assert await waiting == "model b"
        assert cache.names == ["b"]

    asyncio.run(run())


def test_use_idle_model_is_unloaded_after_timeout():
    async def run():
        loads = Loads()
        cache = make_cache(loads, idle_timeout_s=0.02)
        async with cache.use("a"):
            await asyncio.sleep(0.05)
            assert cache.names == ["a"]
        await asyncio.sleep(0.05)
        assert (cache.names, loads.num_unloaded) == ([], 1)

    asyncio.run(run())


def test_use_failed_load_is_tried_again():
    async def run():
        loads = Loads()
        cache = make_cache(loads, max_models=1)
        for _ in range(2):
            with pytest.raises(ValueError, match="damaged"):
                await use(cache, "damaged")
        assert await use(cache, "a") == "model a"
        assert loads.names == ["damaged", "damaged", "a"]

    asyncio.run(run())


def test_use_canceled_request_keeps_the_load():
    """The next request finds the model that the canceled one had started to load."""

    async def run():
        loads = Loads(seconds=0.02)
        cache = make_cache(loads, idle_timeout_s=0.05)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(use(cache, "a"), 0.005)
        assert await use(cache, "a") == "model a"
        assert loads.names == ["a"]
        await asyncio.sleep(0.1)
        assert cache.names == []

    asyncio.run(run())


def test_use_canceled_twice_while_loading_keeps_the_model_in_use():
    """Each canceled request of a loading model would start its own timer, which removes the model of later ones."""

    async def run():
        loads = Loads(seconds=0.05)
        cache = make_cache(loads, idle_timeout_s=0.1)
        for _ in range(2):
            waiting = asyncio.create_task(use(cache, "a"))
            await asyncio.sleep(0.01)
            waiting.cancel()
            await asyncio.sleep(0)
        await asyncio.sleep(0.08)
        async with cache.use("a"):
            await asyncio.sleep(0.2)
            assert cache.names == ["a"]
        await asyncio.sleep(0.2)
        assert (cache.names, loads.names, loads.num_unloaded) == ([], ["a"], 1)

    asyncio.run(run())


def test_use_waits_for_the_slot_of_a_model_that_is_still_loading():
    """A model that no request waits for any more occupies memory until it has loaded."""

    async def run():
        loads = Loads(seconds=0.05)
        cache = make_cache(loads, max_models=1)
        waiting = asyncio.create_task(use(cache, "a"))
        await asyncio.sleep(0.01)
        waiting.cancel()
        next_use = asyncio.create_task(use(cache, "b"))
        await asyncio.sleep(0.02)
        assert loads.names == ["a"]
        assert await next_use == "model b"
        assert (cache.names, loads.num_unloaded) == (["b"], 1)

    asyncio.run(run())
