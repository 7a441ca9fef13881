"""Placement groups of killed actors: Ray keeps them, and a sweep takes back what they hold."""

import time

import ray
from ray.util.placement_group import placement_group, remove_placement_group

from bsq_ray.tuning.placement_group_cleanup import remove_orphaned_groups


def free(expected, seconds=30):
    """CPUs that are free, once they are as expected or the time is over."""
    deadline = time.monotonic() + seconds
    while (cpus := ray.available_resources().get("CPU", 0)) != expected and time.monotonic() < deadline:
        time.sleep(0.2)
    return cpus


def test_only_what_dead_actors_have_left_is_taken_back(ray_local):
    class Holder:
        """As Ray Train's controller does: an actor that reserves resources for its workers."""

        def reserve(self):
            self.group = placement_group([{"CPU": 1}])
            return self.group.wait(60)

    before = free(4)
    living, dying = (ray.remote(num_cpus=0)(Holder).remote() for _ in range(2))
    own = placement_group([{"CPU": 1}])
    assert all(ray.get([living.reserve.remote(), dying.reserve.remote()]))
    assert own.wait(60)
    assert remove_orphaned_groups() == 0
    ray.kill(dying)
    # Nobody else gives it back.
    time.sleep(3)
    assert free(before - 3, 5) == before - 3
    assert remove_orphaned_groups() == 1
    assert free(before - 2) == before - 2
    assert remove_orphaned_groups() == 0
    ray.kill(living)
    remove_placement_group(own)
    time.sleep(1)
    deadline = time.monotonic() + 30
    while not remove_orphaned_groups() and time.monotonic() < deadline:
        time.sleep(0.5)
    assert free(before) == before
