"""Removal of placement groups that a killed trial left behind.

Ray removes a placement group when the job that created it ends, and a sweep is one job.
Ray Train's own cleanup asks the dashboard whether a training is alive, and a local Ray has no dashboard.
"""

from __future__ import annotations

from bsq_ray.runtime._ray_internals import placement_groups_of_dead_actors


def remove_orphaned_placement_groups() -> int:
    """Remove this job's placement groups whose creators were actors that are dead; return how many there were."""
    from ray.util.placement_group import remove_placement_group

    groups = placement_groups_of_dead_actors()
    for group in groups:
        remove_placement_group(group)
    return len(groups)
