"""Placement groups of killed actors: Ray keeps them, and a sweep takes back what they hold."""

import time

import ray
from ray.util.placement_group import placement_group, remove_placement_group

from bsq_ray.tuning.placement_group_cleanup import remove_orphaned_placement_groups


def wait_for_free_cpus(expected_cpus, timeout_s=30):
    """CPUs that are free, once they are as expected or the time is over."""
    deadline = time.monotonic() + timeout_s
    while (cpus := ray.available_resources().get("CPU", 0)) != expected_cpus and time.monotonic() < deadline:
        time.sleep(0.2)
    return cpus


def test_remove_orphans_only_from_dead_actors(ray_local):
    """Only placement groups whose creator actor is dead are removed."""

    class Holder:
        """As Ray Train's controller does: an actor that reserves resources for its workers."""

        def reserve(self):
            self.group = placement_group([{"CPU": 1}])
            return self.group.wait(60)

    initial_cpus = wait_for_free_cpus(4)
    living_actor, killed_actor = (ray.remote(num_cpus=0)(Holder).remote() for _ in range(2))
    driver_group = placement_group([{"CPU": 1}])
    assert all(ray.get([living_actor.reserve.remote(), killed_actor.reserve.remote()]))
    assert driver_group.wait(60)
    assert remove_orphaned_placement_groups() == 0
    ray.kill(killed_actor)
    # Nobody else gives it back.
    time.sleep(3)
    assert wait_for_free_cpus(initial_cpus - 3, 5) == initial_cpus - 3
    assert remove_orphaned_placement_groups() == 1
    assert wait_for_free_cpus(initial_cpus - 2) == initial_cpus - 2
    assert remove_orphaned_placement_groups() == 0
    ray.kill(living_actor)
    remove_placement_group(driver_group)
    time.sleep(1)
    deadline = time.monotonic() + 30
    while not remove_orphaned_placement_groups() and time.monotonic() < deadline:
        time.sleep(0.5)
    assert wait_for_free_cpus(initial_cpus) == initial_cpus
